// cross_entropy on CPU: row statistics of one slice of the vocabulary, and its gradient. Math: kernels/cross_entropy.py
#include <cmath>
#include <limits>

#include "common.h"
#include "fresh.h"
#include "math.h"
#include "sums.h"

namespace interlace {
namespace {

constexpr int64_t BLOCK = 1024;  // columns: 4 KB in fp32, so that the second look at them (max, then exp) is in L1

// In lanes, as sums.h: a compare and a choice that wait for the one before cost 8 cycles.
template <class T, class A> A block_max(const T* x, int64_t n) {
  A lanes[LANES], m = -std::numeric_limits<A>::infinity();
  std::fill_n(lanes, LANES, m);
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; j++) lanes[j] = up(x[k + j]) > lanes[j] ? up(x[k + j]) : lanes[j];
  }
  for (; k < n; k++) m = up(x[k]) > m ? up(x[k]) : m;
  for (int j = 0; j < LANES; j++) m = lanes[j] > m ? lanes[j] : m;
  return m;  // passes over NaN: the sum of exp carries it
}

template <class T, class A> A block_sum(const T* x, int64_t n, A shift) {
  return sum<A>(n, [=](int64_t i) { return exp_(up(x[i]) - shift); });
}

// Per row (max, sum of exp(x - max), target logit or 0) in one pass over memory; (-inf, 0, 0) for ignored rows.
Tensor stats(Tensor logits, Tensor targets, int64_t first, int64_t valid, int64_t ignore_index) {
  const int64_t N = logits.size(0), V = logits.size(1);
  Tensor result = fresh_stat(logits, {N, 3});
  dispatch(logits, "cross_entropy", [&]<class T>(T) {
    using A = acc_t<T>;
    constexpr A inf = std::numeric_limits<A>::infinity();
    const T* xp = in<T>(logits);
    const int64_t* tp = in<int64_t>(targets);
    A* rp = out<A>(result);
    rows(N, valid, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T* x = xp + n * V;
        const bool ignored = tp[n] == ignore_index;
        A m = -inf;
        double sum = 0;  // block sums in fp64: fp32 all the way errs by 60 eps at V = 128k
        for (int64_t i = 0; !ignored && i < valid; i += BLOCK) {
          const int64_t len = std::min(BLOCK, valid - i);
          const A bm = block_max<T, A>(x + i, len);
          if (bm > m) {
            sum *= std::exp(static_cast<double>(m) - bm);  // exp(-inf) = 0 the first time
            m = bm;
          }
          sum += block_sum<T, A>(x + i, len, m == -inf ? A(0) : m);  // a row of -inf only: 0, not exp(-inf + inf)
        }
        const int64_t t = tp[n] - first;
        rp[3 * n] = m;
        rp[3 * n + 1] = static_cast<A>(sum);
        rp[3 * n + 2] = !ignored && t >= 0 && t < valid ? up(x[t]) : A(0);
      }
    });
  });
  return result;
}

// stats [t, N, 3] of every rank -> loss, m, total [N], in rank order.
std::tuple<Tensor, Tensor, Tensor> combine(Tensor stats, Tensor targets, int64_t ignore_index) {
  const int64_t t = stats.size(0), N = stats.size(1);
  Tensor loss = fresh(stats, {N}), top = fresh(stats, {N}), sums = fresh(stats, {N});
  dispatch(stats, "cross_entropy", [&]<class T>(T) {
    using A = acc_t<T>;
    const A* sp = in<A>(stats);
    const int64_t* tp = in<int64_t>(targets);
    A *lp = out<A>(loss), *mp = out<A>(top), *zp = out<A>(sums);
    rows(N, 16 * t, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        A m = -std::numeric_limits<A>::infinity(), total = 0, target = 0;
        for (int64_t r = 0; r < t; r++) m = std::max(m, sp[3 * (r * N + n)]);
        m = m == -std::numeric_limits<A>::infinity() ? A(0) : m;  // an ignored row: no inf - inf below
        for (int64_t r = 0; r < t; r++) {
          const A* s = sp + 3 * (r * N + n);
          total += s[1] * std::exp(s[0] - m);
          target += s[2];
        }
        const bool ignored = tp[n] == ignore_index;
        mp[n] = m;
        zp[n] = ignored ? A(1) : total;
        lp[n] = ignored ? A(0) : std::log(total) - (target - m);
      }
    });
  });
  return {loss, top, sums};
}

// dlogits = (exp(x - shift) / total - onehot) * dloss; zero for ignored rows and for padding columns.
Tensor bwd(Tensor dloss, Tensor logits, Tensor targets, Tensor shift, Tensor total, int64_t first, int64_t valid,
           int64_t ignore_index) {
  const int64_t N = logits.size(0), V = logits.size(1);
  Tensor dlogits = fresh_like(logits);
  dispatch(logits, "cross_entropy", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(logits);
    const A *dp = in<A>(dloss), *sp = in<A>(shift), *zp = in<A>(total);
    const int64_t* tp = in<int64_t>(targets);
    T* op = out<T>(dlogits);
    rows(N, V, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T* x = xp + n * V;
        T* d = op + n * V;
        const int64_t t = tp[n] - first, last = tp[n] == ignore_index ? 0 : valid;
        const A s = sp[n], g = dp[n], scale = g / zp[n];
#pragma omp simd
        for (int64_t i = 0; i < last; i++) d[i] = down<T>(exp_(up(x[i]) - s) * scale);
        if (t >= 0 && t < last) d[t] = down<T>(exp_(up(x[t]) - s) * scale - g);
        std::memset(static_cast<void*>(d + last), 0, (V - last) * sizeof(T));  // +0 in every float type
      }
    });
  });
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("cross_entropy_stats", TORCH_BOX(&stats));
  m.impl("cross_entropy_combine", TORCH_BOX(&combine));
  m.impl("cross_entropy_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
