// gelu on CPU, exact or its tanh form. Math and shapes: kernels/gelu.py
#include "activations.h"
#include "common.h"
#include "fresh.h"

namespace interlace {
namespace {

template <class F> void pick(bool tanh, const F& f) { activation(tanh ? 2 : 1, f); }

Tensor fwd(Tensor x, bool tanh) {
  Tensor y = fresh_like(x);
  dispatch(x, "gelu", [&]<class T>(T) {
    pick(tanh, [&]<class F>(F) {
      const T* xp = in<T>(x);
      T* yp = out<T>(y);
      rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; i++) yp[i] = down<T>(F::at(up(xp[i])).y);
      });
    });
  });
  return y;
}

Tensor bwd(Tensor dy, Tensor x, bool tanh) {
  Tensor dx = fresh_like(x);
  dispatch(x, "gelu", [&]<class T>(T) {
    pick(tanh, [&]<class F>(F) {
      const T *dyp = in<T>(dy), *xp = in<T>(x);
      T* dxp = out<T>(dx);
      rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
#pragma omp simd
        for (int64_t i = begin; i < end; i++) dxp[i] = down<T>(up(dyp[i]) * F::at(up(xp[i])).slope);
      });
    });
  });
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("gelu_fwd", TORCH_BOX(&fwd));
  m.impl("gelu_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
