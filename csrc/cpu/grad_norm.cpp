// grad_norm on CPU: sum of squares over a list of tensors, in fp64. Numerics: kernels/grad_norm.py
#include <vector>

#include "common.h"

namespace interlace {
namespace {

constexpr int64_t CHUNK = 16384, LANES = 32;

template <class T> double square_sum(const T* x, int64_t n) {
  double lane[LANES] = {}, total = 0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
#pragma omp simd
    for (int64_t j = 0; j < LANES; j++) {
      const double one = up(x[i + j]);
      lane[j] += one * one;
    }
  }
  for (int64_t j = 0; i < n; i++, j++) lane[j] += static_cast<double>(up(x[i])) * up(x[i]);
  for (int64_t j = 0; j < LANES; j++) total += lane[j];
  return total;
}

Tensor grad_square_sum(std::vector<Tensor> grads, std::vector<double> factors) {
  Tensor sum = torch::stable::new_empty(grads[0], {1}, ScalarType::Double);
  dispatch(grads[0], "grad_norm", [&]<class T>(T) {
    struct Part { const T* x; int64_t n; double factor; };
    std::vector<Part> parts;
    for (size_t k = 0; k < grads.size(); k++)
      for (int64_t n = grads[k].numel(), at = 0; at < n; at += CHUNK)
        parts.push_back({in<T>(grads[k]) + at, std::min(CHUNK, n - at), factors[k]});
    std::vector<double> sums(parts.size());
    rows(parts.size(), CHUNK, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) sums[i] = square_sum<T>(parts[i].x, parts[i].n) * parts[i].factor;
    });
    double total = 0;
    for (double s : sums) total += s;
    *out<double>(sum) = total;
  });
  return sum;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) { m.impl("grad_square_sum", TORCH_BOX(&grad_square_sum)); }
}  // namespace
}  // namespace interlace
