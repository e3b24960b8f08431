// attention on CPU: o = softmax(scale q k^T) v, each query over the keys up to its own place. Math and shapes: kernels/attention.py
//
// One thread has a head. Forward: a strip of MR queries meets all its keys, so that a softmax is whole and needs no second scale; the
// strip's scores stay in L1 (to S = 1024). Backward: all five products over the transposed scores, MR keys by BLOCK queries, where lse and
// delta lie along the vectors and the strips are the left sides of dv and dk; those of dk are kept as panels besides, the right side of dq.
#include <cmath>
#include <tuple>

#include "fresh.h"
#include "gemm.h"
#include "math.h"
#include "sums.h"

namespace interlace {
namespace {
using namespace tiles;
constexpr int64_t BLOCK = 32 * MR, PANEL = (BLOCK + 1) * NR;  // panels a power of two apart would meet in few sets of L1

struct Heads {  // [S, B, H, D] of any strides but the last
  const Tensor& t;
  int64_t S = t.size(0), B = t.size(1), H = t.size(2), D = t.size(3);
  template <class T> View of(int64_t b, int64_t h) const { return {in<T>(t) + b * t.stride(1) + h * t.stride(2), S, D, t.stride(0), 1}; }
};

inline int64_t whole(int64_t n) { return panels(n) * NR; }

struct Carve {  // one room, cut into parts that begin on lines
  float* at;
  static int64_t size(int64_t n) { return (n + 15) / 16 * 16; }
  float* operator()(int64_t n) { return std::exchange(at, at + size(n)); }
};

// Columns of m in panels, [N / NR][K][NR], the last one filled up with zeros.
template <class T> void by_columns(float* to, const View& m) {
  for (int64_t p = 0; p < panels(m.cols); p++) {
    float* at = to + p * m.rows * NR;
    const int64_t wide = std::min(NR, m.cols - p * NR);
    if (wide < NR) std::memset(at, 0, static_cast<size_t>(4 * m.rows * NR));
    pack<T>(at, NR, m, 0, p * NR, m.rows, wide);
  }
}

inline void times(float* x, int64_t n, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "attention: q, k and v must be [S, B, heads, D]");
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0 && v.size(2) == k.size(2), "attention: heads of q must be a multiple of k's");
  for (const Tensor* t : {&q, &k, &v}) {
    for (int d : {0, 1, 3}) STD_TORCH_CHECK(t->size(d) == q.size(d), "attention: q, k and v must have one S, B and D");
    STD_TORCH_CHECK(t->size(3) < 2 || !t->numel() || t->stride(3) == 1, "attention: the last dimension must be contiguous");
  }
}

template <class F> void floats(const Tensor& t, const F& f) {
  dispatch(t, "attention", [&]<class T>(T x) {
    if constexpr (!std::is_same_v<T, double>) f(x);
    else STD_TORCH_CHECK(false, "attention: dtype must be float32, bfloat16 or float16");
  });
}

// ---- forward

// x = exp(x - max) over the first n of some panels of scores, 0 behind; returns the log of their sum, and what the caller multiplies by.
std::pair<float, float> softmax(float* x, int64_t n) {
  const int64_t end = whole(n);
  std::fill(x + n, x + end, -HUGE_VALF);
  float top[NR], total[NR] = {};
  std::fill(top, top + NR, -HUGE_VALF);
  for (int64_t i = 0; i < end; i += NR)
#pragma omp simd
    for (int64_t j = 0; j < NR; j++) top[j] = x[i + j] > top[j] ? x[i + j] : top[j];
  const float most = *std::max_element(top, top + NR);
  for (int64_t i = 0; i < end; i += NR)
#pragma omp simd
    for (int64_t j = 0; j < NR; j++) {
      x[i + j] = exp_(x[i + j] - most);
      total[j] += x[i + j];
    }
  const float sum = fold<NR / 2>(total);
  return {most + std::log(sum), 1.0f / sum};
}

// o: its rows are `step` apart
template <class T> void head_fwd(const View& q, const View& k, const View& v, float scale, T* o, int64_t step, float* lse) {
  const int64_t S = q.rows, D = q.cols, wide = whole(S), deep = whole(D);
  float *kt = room<3>(D * wide), *vs = room<4>(S * deep);
  Carve carve{room<5>(MR * (Carve::size(D) + wide + deep))};
  float *rows = carve(MR * D), *scores = carve(MR * wide), *sums = carve(MR * deep);
  by_columns<T>(kt, k.flipped());
  by_columns<T>(vs, v);
  const float *left[MR], *probs[MR];
  for (int r = 0; r < MR; r++) left[r] = rows + r * D, probs[r] = scores + r * wide;
  for (int64_t i = 0; i < S; i += MR) {
    const int64_t R = std::min<int64_t>(MR, S - i), seen = i + R;
    pack<T>(rows, D, q, i, 0, R, D);
    times(rows, R * D, scale);
    for (int64_t p = 0; p < panels(seen); p++) TILES[R](D, left, kt + p * D * NR, scores + p * NR, wide, false);
    float over[MR];
    for (int64_t r = 0; r < R; r++) {
      float* x = scores + r * wide;
      std::fill(x + whole(i + r + 1), x + whole(seen), 0.0f);
      std::tie(lse[i + r], over[r]) = softmax(x, i + r + 1);
    }
    for (int64_t p = 0; p < panels(D); p++) TILES[R](seen, probs, vs + p * S * NR, sums + p * NR, deep, false);
    for (int64_t r = 0; r < R; r++) {
      T* to = o + (i + r) * step;
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] = down<T>(sums[r * deep + d] * over[r]);
    }
  }
}

std::tuple<Tensor, Tensor> fwd(Tensor q, Tensor k, Tensor v, double scale) {
  check(q, k, v);
  const Heads Q{q}, K{k}, V{v};
  Tensor o = fresh(q, {Q.S, Q.B, Q.H, Q.D}), lse = fresh_stat(q, {Q.B, Q.H, Q.S});
  floats(q, [&]<class T>(T) {
    torch::stable::parallel_for(0, Q.B * Q.H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t b = n / Q.H, h = n % Q.H, g = h / (Q.H / K.H);
        head_fwd<T>(Q.of<T>(b, h), K.of<T>(b, g), V.of<T>(b, g), static_cast<float>(scale), out<T>(o) + n * Q.D, Q.B * Q.H * Q.D,
                    out<float>(lse) + n * Q.S);
      }
    });
  });
  return {o, lse};
}

// ---- backward

struct Back {  // what the backward of a head works on
  int64_t S, D, wide = whole(S), deep = whole(D), apart = wide + V;  // apart: between the rows of kt, of which eight meet
  Carve carve{room<5>(3 * wide * D + 2 * S * deep + 2 * wide + 2 * MR * BLOCK + BLOCK / NR * PANEL + D * NR + 2 * Carve::size(S * D) +
                      D * apart)};
  float *qt = carve(wide * D), *gt = carve(wide * D), *dqt = carve(wide * D);  // panels of queries: q^T, do^T, dq^T
  float *qs = carve(S * deep), *gs = carve(S * deep);                          // panels of channels: q, do
  float *lse = carve(wide), *delta = carve(wide);
  float *probs = carve(MR * BLOCK), *grads = carve(MR * BLOCK), *kept = carve(BLOCK / NR * PANEL), *turned = carve(D * NR);
  float *ks = carve(S * D), *vs = carve(S * D), *kt = carve(D * apart);

  template <class T> void load(const View& q, const View& k, const View& v, const View& o, const View& g, const float* sums, float scale) {
    by_columns<T>(qt, q.flipped());
    by_columns<T>(gt, g.flipped());
    by_columns<T>(qs, q);
    by_columns<T>(gs, g);
    times(qt, wide * D, scale);
    times(qs, S * deep, scale);
    pack<T>(ks, D, k, 0, 0, S, D);
    pack<T>(vs, D, v, 0, 0, S, D);
    pack<T>(kt, apart, k.flipped(), 0, 0, D, S);
    for (int64_t i = 0; i < S; i++) {
      const T *a = o.at<T>(i, 0), *b = g.at<T>(i, 0);
      for (int64_t d = 0; d < D; d += 64 / sizeof(T))  // rows lie pages apart, where the hardware does not look ahead
        __builtin_prefetch(a + 8 * o.down + d), __builtin_prefetch(b + 8 * g.down + d);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; d++) sum += up(a[d]) * up(b[d]);
      delta[i] = sum, lse[i] = sums[i];
    }
    std::fill(lse + S, lse + wide, HUGE_VALF);  // no query there: probability 0
    std::fill(delta + S, delta + wide, 0.0f);
  }

  // Keys j .. j + R, below keys, against queries first .. end, of the block that begins at j0, i0: adds to dk and dv.
  void strip(int64_t j, int64_t R, int64_t j0, int64_t i0, int64_t first, int64_t end, float* dk, float* dv) {
    const float *left[MR], *right[MR];
    const auto scores = [&](const float* rows, const float* columns, float* to) {
      for (int64_t r = 0; r < R; r++) left[r] = rows + (j + r) * D;
      for (int64_t i = first; i < end; i += NR) TILES[R](D, left, columns + i * D, to + i - first, BLOCK, false);
    };
    scores(ks, qt, probs);
    scores(vs, gt, grads);
    const int64_t n = end - first, there = std::min(S, end) - first;
    for (int64_t r = 0; r < R; r++) {
      float *p = probs + r * BLOCK, *g = grads + r * BLOCK;
      const float *norm = lse + first, *mean = delta + first;
#pragma omp simd
      for (int64_t i = 0; i < n; i++) {
        p[i] = exp_(p[i] - norm[i]);
        g[i] = p[i] * (g[i] - mean[i]);
      }
      for (int64_t i = 0; i < j + r - first; i++) p[i] = g[i] = 0;  // queries before the key
      for (int64_t i = 0; i < n; i += NR) std::memcpy(kept + (first - i0 + i) / NR * PANEL + (j - j0 + r) * NR, g + i, 4 * NR);
      left[r] = p, right[r] = g;
    }
    for (int64_t p = 0; p < panels(D); p++) {
      TILES[R](there, left, gs + (p * S + first) * NR, dv + j * deep + p * NR, deep, true);
      TILES[R](there, right, qs + (p * S + first) * NR, dk + j * deep + p * NR, deep, true);
    }
  }

  void run(float* dk, float* dv) {
    const float* left[MR];
    for (int64_t j0 = 0; j0 < S; j0 += BLOCK)
      for (int64_t i0 = j0; i0 < S; i0 += BLOCK) {
        const int64_t keys = std::min(S, j0 + BLOCK), end = std::min(wide, i0 + BLOCK);
        for (int64_t j = j0; j < keys; j += MR) strip(j, std::min<int64_t>(MR, keys - j), j0, i0, std::max(i0, j / NR * NR), end, dk, dv);
        for (int64_t i = i0; i < end; i += NR)
          for (int64_t d = 0; d < D; d += MR) {
            const int64_t R = std::min<int64_t>(MR, D - d);
            for (int64_t r = 0; r < R; r++) left[r] = kt + (d + r) * apart + j0;
            TILES[R](std::min(keys, i + NR) - j0, left, kept + (i - i0) / NR * PANEL, dqt + i * D + d * NR, NR, j0 > 0);
          }
      }
  }

  template <class T> void write(T* dq, int64_t step, float scale) {
    for (int64_t i = 0; i < S; i += NR) {
      const int64_t n = std::min(NR, S - i);
      pack<float>(turned, D, {dqt + i * D, n, D, 1, NR}, 0, 0, n, D);
      times(turned, n * D, scale);
      for (int64_t r = 0; r < n; r++) store(dq + (i + r) * step, turned + r * D, D, false);
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, double scale) {
  check(q, k, v);
  const Heads Q{q}, K{k}, V{v}, O{o}, G{dout};
  const int64_t S = Q.S, D = Q.D, each = Q.H / K.H, size = S * whole(D);
  Tensor dq = fresh(q, {S, Q.B, Q.H, D}), dk = fresh(k, {S, Q.B, K.H, D}), dv = fresh(v, {S, Q.B, K.H, D});
  Tensor parts = fresh_stat(q, {each > 1 ? Q.B * Q.H * 2 * size : 0});  // of a group's heads: each has a thread, their sum one order
  floats(q, [&]<class T>(T) {
    const auto finish = [&](int64_t n, const float* sums) {
      for (int64_t i = 0; i < S; i++) {
        store(out<T>(dk) + (i * Q.B * K.H + n) * D, sums + i * whole(D), D, false);
        store(out<T>(dv) + (i * Q.B * K.H + n) * D, sums + size + i * whole(D), D, false);
      }
    };
    torch::stable::parallel_for(0, Q.B * Q.H, 1, [&](int64_t begin, int64_t end) {
      Back back{S, D};
      for (int64_t n = begin; n < end; n++) {
        const int64_t b = n / Q.H, h = n % Q.H, g = h / each;
        float* sums = each > 1 ? out<float>(parts) + n * 2 * size : room<3>(2 * size);
        std::fill(sums, sums + 2 * size, 0.0f);
        back.load<T>(Q.of<T>(b, h), K.of<T>(b, g), V.of<T>(b, g), O.of<T>(b, h), G.of<T>(b, h), in<float>(lse) + n * S,
                     static_cast<float>(scale));
        back.run(sums, sums + size);
        back.write<T>(out<T>(dq) + n * D, Q.B * Q.H * D, static_cast<float>(scale));
        if (each == 1) finish(n, sums);
      }
    });
    if (each > 1)
      torch::stable::parallel_for(0, Q.B * K.H, 1, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) {
          float* sums = out<float>(parts) + n * each * 2 * size;
          for (int64_t r = 1; r < each; r++) store(sums, sums + r * 2 * size, 2 * size, true);
          finish(n, sums);
        }
      });
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&fwd));
  m.impl("attention_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
