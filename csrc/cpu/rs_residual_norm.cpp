// rs_residual_norm on CPU: the reduce-scatter of csrc/runtime hands over rows that it has just made readable; here they are summed in
// rank order, joined by the residual and normalised before they leave the cache. Math and shapes: kernels/comm/rs_residual_norm.py
#include "norm_rows.h"

namespace interlace {
namespace {

using Take = void (*)(void* self, int64_t at, int64_t m, const void* const* from);
using Scatter = int (*)(void* heap, int op, const void* src, int64_t rows, int64_t cols, int dtype, Take take, void* self);

template <class T> struct Norm {
  using A = acc_t<T>;
  const T *residual, *w, *b;  // b: LayerNorm's, null for RMSNorm
  T *h, *y;
  A *mean, *rstd;
  int64_t D;
  A eps;
  int world;

  // h = sum over ranks of their row, + residual, rounded once.
  template <int W> void sum(const T* const* from, const T* res, T* to) const {
    const T *a = from[0], *b = from[1], *c = from[W > 2 ? 2 : 0], *d = from[W > 3 ? 3 : 0];
#pragma omp simd
    for (int64_t i = 0; i < D; i++) {
      A s = up(a[i]) + up(b[i]);
      if constexpr (W > 2) s += up(c[i]);
      if constexpr (W > 3) s += up(d[i]);
      to[i] = down<T>(s + up(res[i]));
    }
  }
  void sum_any(const T* const* from, const T* res, T* to) const {
    constexpr int64_t B = 256;
    A s[B];
    for (int64_t at = 0; at < D; at += B) {
      const int64_t n = std::min(B, D - at);
      for (int64_t i = 0; i < n; i++) s[i] = up(from[0][at + i]);
      for (int r = 1; r < world; r++)
        for (int64_t i = 0; i < n; i++) s[i] += up(from[r][at + i]);
      for (int64_t i = 0; i < n; i++) to[at + i] = down<T>(s[i] + up(res[at + i]));
    }
  }

  void run(int64_t at, int64_t m, const void* const* from) const {
    rows(m, D * world, [&](int64_t begin, int64_t end) {
      const T* row[64];
      for (int64_t n = begin; n < end; n++) {
        const int64_t i = at + n;
        for (int r = 0; r < world; r++) row[r] = static_cast<const T*>(from[r]) + n * D;
        const T* res = residual + i * D;
        T* to = h + i * D;
        if (world == 2) sum<2>(row, res, to);
        else if (world == 3) sum<3>(row, res, to);
        else if (world == 4) sum<4>(row, res, to);
        else sum_any(row, res, to);
        if (b) mean[i] = layer_row<T, A>(to, w, b, y + i * D, rstd[i], D, eps);
        else rstd[i] = rms_row<T, A>(to, w, y + i * D, D, eps);
      }
    });
  }
};
}  // namespace
}  // namespace interlace

using namespace interlace;

// rows: of this rank. scatter: interlace_scatter_rows. dtype: its code. world <= 64. Returns the code of the collective.
extern "C" __attribute__((visibility("default"))) int interlace_rs_residual_norm(
    Scatter scatter, void* heap, int op, const void* partial, const void* residual, const void* w, const void* b, void* h, void* y,
    void* mean, void* rstd, int64_t rows, int64_t D, double eps, int dtype, int world) {
  const auto run = [&]<class T>(T) {
    using A = acc_t<T>;
    Norm<T> norm{static_cast<const T*>(residual), static_cast<const T*>(w), static_cast<const T*>(b), static_cast<T*>(h),
                 static_cast<T*>(y), static_cast<A*>(mean), static_cast<A*>(rstd), D, A(eps), world};
    const Take take = [](void* self, int64_t at, int64_t m, const void* const* from) { static_cast<Norm<T>*>(self)->run(at, m, from); };
    return scatter(heap, op, partial, rows, D, dtype, take, &norm);
  };
  return dtype == 0 ? run(double{}) : dtype == 1 ? run(float{}) : dtype == 2 ? run(bf16{}) : run(fp16{});
}
