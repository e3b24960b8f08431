// rms_row, layer_rows: the norms of rows that lie in cache, for rms_norm.cpp, layer_norm.cpp and rs_residual_norm.cpp
#pragma once
#include <cmath>

#include "common.h"
#include "sums.h"

namespace interlace {
// y = h * rstd * (w + offset); returns rstd.
template <class T, class A> A rms_row(const T* h, const T* w, T* y, int64_t D, A eps, A offset = 0) {
  const A r = A(1) / std::sqrt(sum<A>(D, [=](int64_t i) { return up(h[i]) * up(h[i]); }) / A(D) + eps);
#pragma omp simd
  for (int64_t i = 0; i < D; i++) y[i] = down<T>(up(h[i]) * r * (up(w[i]) + offset));
  return r;
}

// (h - m)^2, or h itself: the terms of the variance and of the mean.
template <bool SQUARE, class T, class A> inline A term(T h, A m) {
  return SQUARE ? (up(h) - m) * (up(h) - m) : up(h);
}

// The means of four rows at once: gcc folds a vector into one number lane by lane, 48 cycles that four rows share
// (69 us against 102 at [1024, 256]).
template <bool SQUARE, class T, class A> void means(const T* const h[4], const A m[4], A s[4], int64_t D) {
  const T *h0 = h[0], *h1 = h[1], *h2 = h[2], *h3 = h[3];
  const A m0 = m[0], m1 = m[1], m2 = m[2], m3 = m[3];
  A a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < D; i++) {
    a += term<SQUARE, T, A>(h0[i], m0);
    b += term<SQUARE, T, A>(h1[i], m1);
    c += term<SQUARE, T, A>(h2[i], m2);
    d += term<SQUARE, T, A>(h3[i], m3);
  }
  s[0] = a / A(D), s[1] = b / A(D), s[2] = c / A(D), s[3] = d / A(D);
}

// Rows [0, n), n <= 4: y = (h - mean) * rstd * w (+ b); the second and third read of a row come from L1. b may be null.
template <class T, class A>
void layer_rows(const T* h, const T* w, const T* b, T* y, A* mean, A* rstd, int64_t n, int64_t D, A eps) {
  const T* hs[4];
  A ms[4] = {0, 0, 0, 0}, vars[4];
  for (int64_t k = 0; k < 4; k++) hs[k] = h + std::min(k, n - 1) * D;  // the last row again where there are fewer
  means<false, T, A>(hs, ms, ms, D);
  means<true, T, A>(hs, ms, vars, D);
  for (int64_t k = 0; k < n; k++) {
    const T* hr = hs[k];
    T* yr = y + k * D;
    const A m = mean[k] = ms[k], r = rstd[k] = A(1) / std::sqrt(vars[k] + eps);
    if (b) {
#pragma omp simd
      for (int64_t i = 0; i < D; i++) yr[i] = down<T>((up(hr[i]) - m) * r * up(w[i]) + up(b[i]));
    } else {
#pragma omp simd
      for (int64_t i = 0; i < D; i++) yr[i] = down<T>((up(hr[i]) - m) * r * up(w[i]));
    }
  }
}
}  // namespace interlace
