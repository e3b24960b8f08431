// unpermute on CPU: o[t] = sum_k p[t, k] y[row_of_slot[t, k]] (+ shared + residual), and its gradients. Shapes: kernels/unpermute.py
#include <optional>
#include <vector>

#include "moe_rows.h"

namespace interlace {
namespace {
// The rows a token takes part in, in the order of k; dropped slots are left out, their rows never read.
template <class T> struct Terms {
  std::vector<const T*> row;
  std::vector<acc_t<T>> p;
  int64_t n = 0;
  explicit Terms(int64_t K) : row(K + 2), p(K + 2) {}
  void add(const T* r, acc_t<T> w) { row[n] = r, p[n++] = w; }
};

template <class T, bool Past> void sum_row(const Terms<T>& terms, const T* const* next, int64_t ahead, T* to, int64_t H) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, B = 4 * L, LINE = 64 / sizeof(T);
  int64_t h = 0;
  for (; h + B <= H; h += B) {
    Pair<A> s0, s1;
    for (int64_t k = 0; k < ahead; k++)
      for (int64_t i = 0; i < B; i += LINE) prefetch(next[k] + h + i);
    for (int64_t k = 0; k < terms.n; k++) {
      const T* r = terms.row[k] + h;
      const A p = terms.p[k];
      s0.add(p, load(r)), s1.add(p, load(r + 2 * L));
    }
    put<Past>(to + h, s0);
    put<Past>(to + h + 2 * L, s1);
  }
  for (; h < H; h++) {
    A s = 0;
    for (int64_t k = 0; k < terms.n; k++) s += terms.p[k] * up(terms.row[k][h]);
    to[h] = down<T>(s);
  }
}

template <class T> struct Source {
  const T *y, *shared, *residual;
  const acc_t<T>* probs;
  const int32_t* row;
  int64_t K, H;
  void terms(int64_t t, Terms<T>& to) const {
    to.n = 0;
    for (int64_t k = 0; k < K; k++)
      if (const int64_t r = row[t * K + k]; r >= 0) to.add(y + r * H, probs ? probs[t * K + k] : acc_t<T>(1));
    if (shared) to.add(shared + t * H, 1);
    if (residual) to.add(residual + t * H, 1);
  }
};

void unpermute_out(Tensor y, std::optional<Tensor> probs, std::optional<Tensor> residual, std::optional<Tensor> shared,
                   Tensor row_of_slot, Tensor, Tensor o) {
  const int64_t T_ = row_of_slot.size(0), K = row_of_slot.size(1), H = y.size(1);
  dispatch(y, "unpermute", [&]<class T>(T) {
    using A = acc_t<T>;
    const Source<T> from{in<T>(y), shared ? in<T>(*shared) : nullptr, residual ? in<T>(*residual) : nullptr,
                         probs ? in<A>(*probs) : nullptr, in<int32_t>(row_of_slot), K, H};
    T* to = out<T>(o);
    const bool past = past_cache(T_ * H * sizeof(T)) && reinterpret_cast<uintptr_t>(to) % kBytes == 0 && H * sizeof(T) % kBytes == 0;
    rows(T_, (K + 1) * H, [&](int64_t begin, int64_t end) {
      Terms<T> now(K), next(K);
      from.terms(begin, now);
      for (int64_t t = begin; t < end; t++, std::swap(now, next)) {
        next.n = 0;
        if (t + 1 < end) from.terms(t + 1, next);
        (past ? sum_row<T, true> : sum_row<T, false>)(now, next.row.data(), next.n, to + t * H, H);
      }
      fence();
    });
  });
}

Tensor unpermute_fwd(Tensor y, std::optional<Tensor> probs, std::optional<Tensor> residual, std::optional<Tensor> shared,
                     Tensor row_of_slot, Tensor slot_of_row) {
  Tensor o = torch::stable::new_empty(y, {row_of_slot.size(0), y.size(1)});
  unpermute_out(y, probs, residual, shared, row_of_slot, slot_of_row, o);
  return o;
}

template <class A> inline A total(vec_t<A> v) {
  for (int w = kLanes<A> / 2; w; w /= 2)
    for (int i = 0; i < w; i++) v[i] += v[i + w];
  return v[0];
}

// dy = p * g, and the dot product of g and y: both rows are read once. next, later: what will be read soon; of two tokens' rows of g
// one is in the cache for all its K rows, the other comes in beside its first.
template <class T, bool Past>
acc_t<T> scale_dot(const T* g, const T* y, const T* next, const T* later, acc_t<T> p, T* dy, int64_t H) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>, B = 4 * L, LINE = 64 / sizeof(T);
  Pair<A> s0, s1;
  A dot = 0;
  int64_t h = 0;
  for (; h + B <= H; h += B) {
    for (int64_t i = 0; i < B; i += LINE) prefetch(next + h + i);
    if (later)
      for (int64_t i = 0; i < B; i += LINE) prefetch(later + h + i);
    const Pair<A> g0 = load(g + h), g1 = load(g + h + 2 * L), y0 = load(y + h), y1 = load(y + h + 2 * L);
    s0.a += g0.a * y0.a, s0.b += g0.b * y0.b, s1.a += g1.a * y1.a, s1.b += g1.b * y1.b;
    put<Past>(dy + h, Pair<A>{p * g0.a, p * g0.b});
    put<Past>(dy + h + 2 * L, Pair<A>{p * g1.a, p * g1.b});
  }
  for (; h < H; h++) {
    dot += up(g[h]) * up(y[h]);
    dy[h] = down<T>(p * up(g[h]));
  }
  return dot + total<A>((s0.a + s0.b) + (s1.a + s1.b));
}

std::tuple<Tensor, Tensor> unpermute_bwd(Tensor g, Tensor y, Tensor probs, Tensor row_of_slot, Tensor slot_of_row) {
  const int64_t T_ = row_of_slot.size(0), K = row_of_slot.size(1), H = y.size(1);
  Tensor dy = torch::stable::empty_like(y), dprobs = torch::stable::empty_like(probs);
  dispatch(y, "unpermute", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *gp = in<T>(g), *yp = in<T>(y);
    const A* p = in<A>(probs);
    const int32_t* row = in<int32_t>(row_of_slot);
    T* dyp = out<T>(dy);
    A* dp = out<A>(dprobs);
    const bool past = past_cache(y.numel() * sizeof(T)) && reinterpret_cast<uintptr_t>(dyp) % kBytes == 0 && H * sizeof(T) % kBytes == 0;
    rows(T_, 2 * (K + 1) * H, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * K; i < end * K; i++) {
        const int64_t r = row[i], ahead = row[std::min(i + 2, end * K - 1)];
        dp[i] = 0;
        if (r < 0) continue;
        const int64_t t = i / K;
        const T* later = i % K == 0 && t + 1 < end ? gp + (t + 1) * H : nullptr;
        dp[i] = (past ? scale_dot<T, true> : scale_dot<T, false>)(gp + t * H, yp + r * H, yp + (ahead < 0 ? r : ahead) * H, later, p[i],
                                                                  dyp + r * H, H);
      }
      fence();
    });
    zero_pads(reinterpret_cast<char*>(dyp), in<int32_t>(slot_of_row), slot_of_row.size(0), H * sizeof(T));
  });
  return {dy, dprobs};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("unpermute_fwd", TORCH_BOX(&unpermute_fwd));
  m.impl("unpermute_out", TORCH_BOX(&unpermute_out));
  m.impl("unpermute_bwd", TORCH_BOX(&unpermute_bwd));
}
}  // namespace
}  // namespace interlace
