// gated on CPU: y = act(gate) * up, gate and up apart. Math and shapes: kernels/gated.py
#include "activations.h"
#include "common.h"
#include "fresh.h"

namespace interlace {
namespace {

Tensor fwd(Tensor gate, Tensor up_, int64_t number) {
  const int64_t N = gate.size(0), F = gate.size(1), gs = gate.stride(0), us = up_.stride(0);
  Tensor y = fresh(gate, {N, F});
  dispatch(gate, "gated", [&]<class T>(T) {
    activation(number, [&]<class Act>(Act) {
      const T *gp = in<T>(gate), *upp = in<T>(up_);
      T* yp = out<T>(y);
      rows(N, F, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) {
          const T *g = gp + n * gs, *u = upp + n * us;
          T* yr = yp + n * F;
#pragma omp simd
          for (int64_t i = 0; i < F; i++) yr[i] = down<T>(Act::at(up(g[i])).y * up(u[i]));
        }
      });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> bwd(Tensor dy, Tensor gate, Tensor up_, int64_t number) {
  const int64_t N = gate.size(0), F = gate.size(1), gs = gate.stride(0), us = up_.stride(0);
  Tensor dgate = fresh(gate, {N, F}), dup = fresh(gate, {N, F});
  dispatch(gate, "gated", [&]<class T>(T) {
    activation(number, [&]<class Act>(Act) {
      const T *dp = in<T>(dy), *gp = in<T>(gate), *upp = in<T>(up_);
      T *dgp = out<T>(dgate), *dup_ = out<T>(dup);
      rows(N, F, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; n++) {
          const T *d = dp + n * F, *g = gp + n * gs, *u = upp + n * us;
          T *dg = dgp + n * F, *du = dup_ + n * F;
#pragma omp simd
          for (int64_t i = 0; i < F; i++) {
            const auto a = Act::at(up(g[i]));
            const auto grad = up(d[i]);
            dg[i] = down<T>(grad * up(u[i]) * a.slope);
            du[i] = down<T>(grad * a.y);
          }
        }
      });
    });
  });
  return {dgate, dup};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("gated_fwd", TORCH_BOX(&fwd));
  m.impl("gated_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
