// swiglu on CPU: y = silu(gate) * up. Math and shapes: kernels/swiglu.py
#include <vector>

#include "common.h"
#include "math.h"

namespace interlace {
namespace {

Tensor fwd(Tensor gate_up) {
  std::vector<int64_t> shape(gate_up.sizes().begin(), gate_up.sizes().end());
  const int64_t F = shape.back() /= 2, N = F ? gate_up.numel() / (2 * F) : 0;
  Tensor y = torch::stable::new_empty(gate_up, shape);
  dispatch(gate_up, "swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(gate_up);
    T* yp = out<T>(y);
    rows(N, F, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T *g = xp + n * 2 * F, *u = g + F;
        T* yr = yp + n * F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
          const A gate = up(g[i]);
          yr[i] = down<T>(gate / (A(1) + exp_(-gate)) * up(u[i]));
        }
      }
    });
  });
  return y;
}

Tensor bwd(Tensor dy, Tensor gate_up) {
  const int64_t F = gate_up.size(-1) / 2, N = F ? gate_up.numel() / (2 * F) : 0;
  Tensor dx = torch::stable::empty_like(gate_up);
  dispatch(gate_up, "swiglu", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *dyp = in<T>(dy), *xp = in<T>(gate_up);
    T* dxp = out<T>(dx);
    rows(N, F, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T *g = xp + n * 2 * F, *u = g + F, *d = dyp + n * F;
        T *dg = dxp + n * 2 * F, *du = dg + F;
#pragma omp simd
        for (int64_t i = 0; i < F; i++) {
          const A gate = up(g[i]), grad = up(d[i]), s = A(1) / (A(1) + exp_(-gate));
          dg[i] = down<T>(grad * up(u[i]) * s * (A(1) + gate * (A(1) - s)));
          du[i] = down<T>(grad * gate * s);
        }
      }
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fwd));
  m.impl("swiglu_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
