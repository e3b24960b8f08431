// clamped_swiglu on CPU: y = (u + 1) * g * sigmoid(alpha * g) * p. Math and shapes: kernels/clamped_swiglu.py
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "fresh.h"
#include "math.h"

namespace interlace {
namespace {

// The bias of each row: f(first row, last row, its expert's bias), over begin .. end; zeros where no expert has the rows.
template <class T, class F>
void by_expert(const std::optional<Tensor>& bias, const std::optional<Tensor>& offsets, int64_t width, int64_t begin, int64_t end, const F& f) {
  const std::vector<T> none(width);
  if (!bias) return f(begin, end, none.data());
  const int64_t E = bias->size(0);
  const int32_t* at = in<int32_t>(*offsets);
  int64_t n = begin;
  for (int64_t e = 0; e < E && n < end; e++) {
    const int64_t last = std::min<int64_t>(end, at[e + 1]);
    if (n < last) f(n, last, in<T>(*bias) + e * width), n = last;
  }
  if (n < end) f(n, end, none.data());
}

template <class A> struct Point { A g, u1, s; };

template <class A> inline Point<A> clamped(A gate, A up, A alpha, A limit) {  // a NaN comes through
  const A g = gate > limit ? limit : gate, low = up < -limit ? -limit : up, u = low > limit ? limit : low;
  return {g, u + A(1), A(1) / (A(1) + exp_(-alpha * g))};
}

Tensor fwd(Tensor z, std::optional<Tensor> bias, std::optional<Tensor> offsets, std::optional<Tensor> probs, double alpha_, double limit_) {
  const int64_t N = z.size(0), F = z.size(1) / 2;
  Tensor y = fresh(z, {N, F});
  dispatch(z, "clamped_swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const A alpha = A(alpha_), limit = A(limit_), *pp = probs ? in<A>(*probs) : nullptr;
    const T* zp = in<T>(z);
    T* yp = out<T>(y);
    rows(N, F, [&](int64_t begin, int64_t end) {
      by_expert<T>(bias, offsets, 2 * F, begin, end, [&](int64_t first, int64_t last, const T* b) {
        for (int64_t n = first; n < last; n++) {
          const T* x = zp + n * 2 * F;
          const A p = pp ? pp[n] : A(1);
          T* yr = yp + n * F;
#pragma omp simd
          for (int64_t i = 0; i < F; i++) {
            const auto c = clamped<A>(up(x[2 * i]) + up(b[2 * i]), up(x[2 * i + 1]) + up(b[2 * i + 1]), alpha, limit);
            yr[i] = down<T>(c.u1 * (c.g * c.s) * p);
          }
        }
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bwd(Tensor dy, Tensor z, std::optional<Tensor> bias, std::optional<Tensor> offsets, std::optional<Tensor> probs,
                               double alpha_, double limit_) {
  const int64_t N = z.size(0), F = z.size(1) / 2;
  Tensor dz = fresh_like(z), dp = fresh_stat(dy, {probs ? N : 0});
  dispatch(z, "clamped_swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const A alpha = A(alpha_), limit = A(limit_), *pp = probs ? in<A>(*probs) : nullptr;
    const T *zp = in<T>(z), *dyp = in<T>(dy);
    T* dzp = out<T>(dz);
    A* dpp = out<A>(dp);
    if (!F) std::fill_n(dpp, dp.numel(), A(0));
    rows(N, F, [&](int64_t begin, int64_t end) {
      by_expert<T>(bias, offsets, 2 * F, begin, end, [&](int64_t first, int64_t last, const T* b) {
        for (int64_t n = first; n < last; n++) {
          const T *x = zp + n * 2 * F, *d = dyp + n * F;
          const A p = pp ? pp[n] : A(1);
          T* dx = dzp + n * 2 * F;
          A dot = 0;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < F; i++) {
            const A gate = up(x[2 * i]) + up(b[2 * i]), lin = up(x[2 * i + 1]) + up(b[2 * i + 1]), grad = up(d[i]);
            const auto c = clamped<A>(gate, lin, alpha, limit);
            const A gs = c.g * c.s, slope = c.s * (A(1) + alpha * c.g * (A(1) - c.s));
            dot += grad * (c.u1 * gs);
            dx[2 * i] = down<T>(gate > limit ? A(0) : p * grad * c.u1 * slope);
            dx[2 * i + 1] = down<T>(lin > limit || lin < -limit ? A(0) : p * grad * gs);
          }
          if (pp) dpp[n] = dot;
        }
      });
    });
  });
  return {dz, dp};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("clamped_swiglu_fwd", TORCH_BOX(&fwd));
  m.impl("clamped_swiglu_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
