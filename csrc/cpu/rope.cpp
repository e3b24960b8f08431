// rope on CPU: each pair (x[i], x[i + Dh/2]) turned by its angle. Math and shapes: kernels/rope.py
#include "common.h"

namespace interlace {
namespace {

// x may be strided in S, B and H (a slice of a fused qkv buffer), never in Dh. inverse: by minus the angle (backward).
Tensor rope(Tensor x, Tensor cos, Tensor sin, bool inverse) {
  const int64_t S = x.size(0), B = x.size(1), H = x.size(2), Dh = x.size(3), d = Dh / 2;
  const int64_t xs = x.stride(0), xb = x.stride(1), xh = x.stride(2);
  STD_TORCH_CHECK(Dh < 2 || x.stride(3) == 1, "rope: the last dimension of x must be contiguous");
  Tensor y = torch::stable::new_empty(x, {S, B, H, Dh});
  dispatch(x, "rope", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(x);
    const A *cp = in<A>(cos), *sp = in<A>(sin), sign = inverse ? A(-1) : A(1);
    T* yp = out<T>(y);
    rows(S * B, H * Dh, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t s = n / B, b = n % B;
        const A *c = cp + s * d, *sn = sp + s * d;
        for (int64_t h = 0; h < H; h++) {
          const T *lo = xp + s * xs + b * xb + h * xh, *hi = lo + d;
          T *ylo = yp + (n * H + h) * Dh, *yhi = ylo + d;
#pragma omp simd
          for (int64_t i = 0; i < d; i++) {
            const A a = up(lo[i]), e = up(hi[i]), t = sign * sn[i];
            ylo[i] = down<T>(a * c[i] - e * t);
            yhi[i] = down<T>(e * c[i] + a * t);
          }
        }
      }
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("rope_fwd", TORCH_BOX(&rope));
}
}  // namespace
}  // namespace interlace
