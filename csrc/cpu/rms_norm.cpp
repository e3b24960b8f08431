// rms_norm on CPU: h = x (+ residual); y = h * rstd * (w + offset). Math and shapes: kernels/rms_norm.py
#include <vector>

#include "fresh.h"
#include "norm_rows.h"

namespace interlace {
namespace {

std::tuple<Tensor, Tensor> fwd(Tensor x, Tensor w, double eps, double offset) {
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  Tensor y = fresh_like(x);
  Tensor rstd = fresh_stat(x, {N});
  dispatch(x, "rms_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *xp = in<T>(x), *wp = in<T>(w);
    T* yp = out<T>(y);
    A* rp = out<A>(rstd);
    rows(N, D, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) rp[n] = rms_row<T, A>(xp + n * D, wp, yp + n * D, D, A(eps), A(offset));
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_fwd(Tensor x, Tensor residual, Tensor w, double eps, double offset) {
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  Tensor h = fresh_like(x), y = fresh_like(x);
  Tensor rstd = fresh_stat(x, {N});
  dispatch(x, "add_rms_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *xp = in<T>(x), *sp = in<T>(residual), *wp = in<T>(w);
    T *hp = out<T>(h), *yp = out<T>(y);
    A* rp = out<A>(rstd);
    rows(N, D, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T *xr = xp + n * D, *sr = sp + n * D;
        T* hr = hp + n * D;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) hr[i] = down<T>(up(xr[i]) + up(sr[i]));
        rp[n] = rms_row<T, A>(hr, wp, yp + n * D, D, A(eps), A(offset));
      }
    });
  });
  return {h, y, rstd};
}

// dh is the gradient that reaches h by its other use (the residual stream), added to dx; an empty tensor when there is none.
std::tuple<Tensor, Tensor> bwd(Tensor dy, Tensor x, Tensor w, Tensor rstd, Tensor dh, double offset) {
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  const int64_t P = std::max<int64_t>(1, std::min<int64_t>(N, torch::stable::get_num_threads()));  // partial sums of dw, fixed by N and threads
  Tensor dx = fresh_like(x), dw = fresh_like(w);
  const bool has_dh = dh.numel() > 0;
  dispatch(x, "rms_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *dyp = in<T>(dy), *xp = in<T>(x), *wp = in<T>(w), *dhp = in<T>(dh);
    const A* rp = in<A>(rstd);
    T* dxp = out<T>(dx);
    std::vector<double> partial(P * D, 0.0);
    torch::stable::parallel_for(0, P, 1, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        double* total = partial.data() + p * D;
        std::vector<A> sums(D, A(0));  // 64 rows at a time in the compute type: 4096 rows in one fp32 sum lost 3 bits to torch
        A* acc = sums.data();
        for (int64_t n = N * p / P, last = N * (p + 1) / P, since = 0; n < last; n++) {
          const T *dyr = dyp + n * D, *xr = xp + n * D, *dhr = dhp + n * D;
          T* dxr = dxp + n * D;
          const A r = rp[n], o = A(offset);
          const A dot = sum<A>(D, [=](int64_t i) { return up(dyr[i]) * (up(wp[i]) + o) * up(xr[i]); });
          const A c = dot * r * r / A(D);  // mean(g * xhat) * rstd, so that dx = rstd * (g - x * c)
          if (has_dh) {
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
              dxr[i] = down<T>(r * (up(dyr[i]) * (up(wp[i]) + o) - up(xr[i]) * c) + up(dhr[i]));
              acc[i] += up(dyr[i]) * (up(xr[i]) * r);
            }
          } else {
#pragma omp simd
            for (int64_t i = 0; i < D; i++) {
              dxr[i] = down<T>(r * (up(dyr[i]) * (up(wp[i]) + o) - up(xr[i]) * c));
              acc[i] += up(dyr[i]) * (up(xr[i]) * r);
            }
          }
          if (++since == 64 || n + 1 == last) {
            for (int64_t i = 0; i < D; i++) total[i] += acc[i], acc[i] = 0;
            since = 0;
          }
        }
      }
    });
    T* dwp = out<T>(dw);
    for (int64_t i = 0; i < D; i++) {
      double s = 0;
      for (int64_t p = 0; p < P; p++) s += partial[p * D + i];
      dwp[i] = down<T>(static_cast<A>(s));
    }
  });
  return {dx, dw};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
