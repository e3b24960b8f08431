// rms_row, layer_row: the norms of rows that lie in cache, for rms_norm.cpp, layer_norm.cpp and rs_residual_norm.cpp
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

// y = (h - mean) * rstd * w (+ b), b may be null; returns mean. The second and third read of a row come from L1.
template <class T, class A> A layer_row(const T* h, const T* w, const T* b, T* y, A& rstd, int64_t D, A eps) {
  const A m = sum<A>(D, [=](int64_t i) { return up(h[i]); }) / A(D);
  const A var = sum<A>(D, [=](int64_t i) { return (up(h[i]) - m) * (up(h[i]) - m); }) / A(D);
  const A r = rstd = A(1) / std::sqrt(var + eps);
  if (b) {
#pragma omp simd
    for (int64_t i = 0; i < D; i++) y[i] = down<T>((up(h[i]) - m) * r * up(w[i]) + up(b[i]));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < D; i++) y[i] = down<T>((up(h[i]) - m) * r * up(w[i]));
  }
  return m;
}
}  // namespace interlace
