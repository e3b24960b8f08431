// swiglu on CPU: y = silu(gate) * up (* p of the row). Math and shapes: kernels/swiglu.py
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "fresh.h"
#include "math.h"

namespace interlace {
namespace {

template <class A> const A* per_row(const std::optional<Tensor>& probs) { return probs ? in<A>(*probs) : nullptr; }

Tensor fwd(Tensor gate_up, std::optional<Tensor> probs) {
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  const int64_t F = shape.back() /= 2, N = F ? gate_up.numel() / (2 * F) : 0;
  Tensor y = fresh(gate_up, shape);
  dispatch(gate_up, "swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(gate_up);
    const A* pp = per_row<A>(probs);
    T* yp = out<T>(y);
    rows(N, F, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T *g = xp + n * 2 * F, *u = g + F;
        const A p = pp ? pp[n] : A(1);
        T* yr = yp + n * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
          const A gate = up(g[i]);
          yr[i] = down<T>(gate / (A(1) + exp_(-gate)) * up(u[i]) * p);
        }
      }
    });
  });
  return y;
}

// One row: dgate and dup; with probs also y once more, and the sum of dy * silu(gate) * up.
template <bool Probs, class T> acc_t<T> bwd_row(const T* d, const T* g, const T* u, acc_t<T> p, T* dg, T* du, T* y, int64_t F) {
  using A = acc_t<T>;
  A dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < F; i++) {
    const A gate = up(g[i]), grad = up(d[i]), s = A(1) / (A(1) + exp_(-gate)), silu = gate * s, scaled = grad * p;
    dg[i] = down<T>(scaled * up(u[i]) * s * (A(1) + gate * (A(1) - s)));
    du[i] = down<T>(scaled * silu);
    if constexpr (Probs) {
      dot += grad * (silu * up(u[i]));
      y[i] = down<T>(silu * up(u[i]) * p);
    }
  }
  return dot;
}

Tensor bwd(Tensor dy, Tensor gate_up) {
  const int64_t F = gate_up.size(-1) / 2, N = F ? gate_up.numel() / (2 * F) : 0;
  Tensor dx = fresh_like(gate_up);
  dispatch(gate_up, "swiglu", [&]<class T>(T) {
    const T *dyp = in<T>(dy), *xp = in<T>(gate_up);
    T* dxp = out<T>(dx);
    rows(N, F, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin, i = n * 2 * F; n < end; n++, i += 2 * F)
        bwd_row<false, T>(dyp + n * F, xp + i, xp + i + F, 1, dxp + i, dxp + i + F, nullptr, F);
    });
  });
  return dx;
}

std::tuple<Tensor, Tensor, Tensor> probs_bwd(Tensor dy, Tensor gate_up, std::optional<Tensor> probs) {
  const int64_t F = gate_up.size(-1) / 2, N = dy.numel() / std::max<int64_t>(F, 1);
  Tensor dx = fresh_like(gate_up), y = fresh_like(dy);
  Tensor dp = fresh_stat(dy, {probs ? probs->numel() : 0});
  dispatch(gate_up, "swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *dyp = in<T>(dy), *xp = in<T>(gate_up);
    const A* pp = per_row<A>(probs);
    T *dxp = out<T>(dx), *yp = out<T>(y);
    A* dpp = out<A>(dp);
    if (!F) std::fill_n(dpp, dp.numel(), A(0));
    rows(N, F, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin, i = n * 2 * F; n < end; n++, i += 2 * F) {
        const A dot = bwd_row<true, T>(dyp + n * F, xp + i, xp + i + F, pp ? pp[n] : A(1), dxp + i, dxp + i + F, yp + n * F, F);
        if (pp) dpp[n] = dot;
      }
    });
  });
  return {dx, dp, y};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&bwd));
  m.impl("swiglu_probs_bwd", TORCH_BOX(&probs_bwd));
}
}  // namespace
}  // namespace interlace
