// rope on CPU: each pair of channels turned by its angle. Math and shapes: kernels/rope.py
#include <cstring>

#include "common.h"
#include "fresh.h"

namespace interlace {
namespace {

// x may be strided in S, B and H (a slice of a fused qkv buffer), never in Dh; cos and sin in S and B. inverse: by minus the angle.
Tensor rope(Tensor x, Tensor cos, Tensor sin, bool inverse, bool interleaved) {
  const int64_t S = x.size(0), B = x.size(1), H = x.size(2), Dh = x.size(3), d = cos.size(2);
  const int64_t xs = x.stride(0), xb = x.stride(1), xh = x.stride(2);
  const int64_t cs = cos.stride(0), cb = cos.stride(1), ss = sin.stride(0), sb = sin.stride(1);
  STD_TORCH_CHECK(Dh < 2 || !x.numel() || x.stride(3) == 1, "rope: the last dimension of x must be contiguous");
  STD_TORCH_CHECK(2 * d <= Dh && cos.size(0) == S && cos.size(1) == B, "rope: cos must be [S, B, d] with 2 d <= Dh");
  STD_TORCH_CHECK(d < 2 || !cos.numel() || (cos.stride(2) == 1 && sin.stride(2) == 1), "rope: the last dimension of the tables must be contiguous");
  Tensor y = fresh(x, {S, B, H, Dh});
  dispatch(x, "rope", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(x);
    const A *cp = in<A>(cos), *sp = in<A>(sin), sign = inverse ? A(-1) : A(1);
    T* yp = out<T>(y);
    rows(S * B, H * Dh, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const int64_t s = n / B, b = n % B;
        const A *c = cp + s * cs + b * cb, *sn = sp + s * ss + b * sb;
        for (int64_t h = 0; h < H; h++) {
          const T* xr = xp + s * xs + b * xb + h * xh;
          T* yr = yp + (n * H + h) * Dh;
          if (interleaved) {
#pragma omp simd
            for (int64_t i = 0; i < d; i++) {
              const A a = up(xr[2 * i]), e = up(xr[2 * i + 1]), t = sign * sn[i];
              yr[2 * i] = down<T>(a * c[i] - e * t);
              yr[2 * i + 1] = down<T>(e * c[i] + a * t);
            }
          } else {
#pragma omp simd
            for (int64_t i = 0; i < d; i++) {
              const A a = up(xr[i]), e = up(xr[i + d]), t = sign * sn[i];
              yr[i] = down<T>(a * c[i] - e * t);
              yr[i + d] = down<T>(e * c[i] + a * t);
            }
          }
          std::memcpy(static_cast<void*>(yr + 2 * d), xr + 2 * d, (Dh - 2 * d) * sizeof(T));
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
