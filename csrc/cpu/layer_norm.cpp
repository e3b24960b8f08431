// layer_norm on CPU: h = x (+ residual); y = (h - mean) * rstd * w (+ b). Math and shapes: kernels/layer_norm.py
#include <optional>
#include <vector>

#include "fresh.h"
#include "norm_rows.h"

namespace interlace {
namespace {

std::tuple<Tensor, Tensor, Tensor> fwd(Tensor x, Tensor w, std::optional<Tensor> b, double eps) {
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  Tensor y = fresh_like(x), mean = fresh_stat(x, {N}), rstd = fresh_stat(x, {N});
  dispatch(x, "layer_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *xp = in<T>(x), *wp = in<T>(w), *bp = b ? in<T>(*b) : nullptr;
    T* yp = out<T>(y);
    A *mp = out<A>(mean), *rp = out<A>(rstd);
    rows(N, D, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) mp[n] = layer_row<T, A>(xp + n * D, wp, bp, yp + n * D, rp[n], D, A(eps));
    });
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_fwd(Tensor x, Tensor residual, Tensor w, std::optional<Tensor> b,
                                                   double eps) {
  const int64_t D = x.size(-1), N = D ? x.numel() / D : 0;
  Tensor h = fresh_like(x), y = fresh_like(x), mean = fresh_stat(x, {N}), rstd = fresh_stat(x, {N});
  dispatch(x, "add_layer_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *xp = in<T>(x), *sp = in<T>(residual), *wp = in<T>(w), *bp = b ? in<T>(*b) : nullptr;
    T *hp = out<T>(h), *yp = out<T>(y);
    A *mp = out<A>(mean), *rp = out<A>(rstd);
    rows(N, D, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++) {
        const T *xr = xp + n * D, *sr = sp + n * D;
        T* hr = hp + n * D;
#pragma omp simd
        for (int64_t i = 0; i < D; i++) hr[i] = down<T>(up(xr[i]) + up(sr[i]));
        mp[n] = layer_row<T, A>(hr, wp, bp, yp + n * D, rp[n], D, A(eps));
      }
    });
  });
  return {h, y, mean, rstd};
}

// One row of dx, and its terms of dw and db. dh is read only with DH.
template <bool DH, class T, class A>
void row_bwd(const T* dy, const T* h, const T* w, const T* dh, A m, A r, T* dx, A* dw, A* db, int64_t D) {
  A s[LANES] = {}, sx[LANES] = {}, g = 0, gx = 0;  // sums of dy * w and of dy * w * (h - m), in one pass
  int64_t k = 0;
  for (; k + LANES <= D; k += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; j++) {
      const A t = up(dy[k + j]) * up(w[k + j]);
      s[j] += t;
      sx[j] += t * (up(h[k + j]) - m);
    }
  }
  for (; k < D; k++) {
    const A t = up(dy[k]) * up(w[k]);
    g += t;
    gx += t * (up(h[k]) - m);
  }
  g = (g + fold(s)) / A(D);
  gx = (gx + fold(sx)) * r / A(D);
#pragma omp simd
  for (int64_t i = 0; i < D; i++) {
    const A d = up(dy[i]), xhat = (up(h[i]) - m) * r;
    A v = r * (d * up(w[i]) - g - xhat * gx);
    if constexpr (DH) v += up(dh[i]);
    dx[i] = down<T>(v);
    dw[i] += d * xhat;
    db[i] += d;
  }
}

// dh is the gradient that reaches h by its other use (the residual stream), added to dx. db is empty without a bias.
std::tuple<Tensor, Tensor, Tensor> bwd(Tensor dy, Tensor h, Tensor w, Tensor mean, Tensor rstd,
                                       std::optional<Tensor> dh, bool bias) {
  const int64_t D = h.size(-1), N = D ? h.numel() / D : 0;
  // P partial sums, fixed by N and the number of threads
  const int64_t P = std::max<int64_t>(1, std::min<int64_t>(N, torch::stable::get_num_threads()));
  Tensor dx = fresh_like(h), dw = fresh_like(w);
  Tensor db = fresh(w, {bias ? D : 0});
  dispatch(h, "layer_norm", [&]<class T>(T) {
    using A = acc_t<T>;
    const T *dyp = in<T>(dy), *hp = in<T>(h), *wp = in<T>(w), *dhp = dh ? in<T>(*dh) : nullptr;
    const A *mp = in<A>(mean), *rp = in<A>(rstd);
    T* dxp = out<T>(dx);
    std::vector<double> partial(P * 2 * D, 0.0);  // [P, dw then db, D]
    torch::stable::parallel_for(0, P, 1, [&](int64_t p0, int64_t p1) {
      for (int64_t p = p0; p < p1; p++) {
        double* total = partial.data() + p * 2 * D;
        std::vector<A> acc(2 * D, A(0));  // 64 rows at a time in the compute type, as in rms_norm.cpp
        for (int64_t n = N * p / P, last = N * (p + 1) / P, since = 0; n < last; n++) {
          const int64_t at = n * D;
          const auto row = dhp ? row_bwd<true, T, A> : row_bwd<false, T, A>;
          row(dyp + at, hp + at, wp, dhp + (dhp ? at : 0), mp[n], rp[n], dxp + at, acc.data(), acc.data() + D, D);
          if (++since == 64 || n + 1 == last) {
            for (int64_t i = 0; i < 2 * D; i++) total[i] += acc[i], acc[i] = 0;
            since = 0;
          }
        }
      }
    });
    T *dwp = out<T>(dw), *dbp = out<T>(db);
    for (int64_t i = 0; i < (bias ? 2 * D : D); i++) {
      double s = 0;
      for (int64_t p = 0; p < P; p++) s += partial[p * 2 * D + i];
      (i < D ? dwp[i] : dbp[i - D]) = down<T>(static_cast<A>(s));
    }
  });
  return {dx, dw, db};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
