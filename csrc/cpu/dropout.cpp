// dropout on CPU: y = keep ? x * scale : 0, keep from a hash of the element's global index. Math: kernels/dropout.py
#include <vector>

#include "common.h"

namespace interlace {
namespace {

inline uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// n elements whose counters are start, start + step, ...
template <class T, class A> void run(const T* x, T* y, int64_t n, uint64_t start, uint64_t step, uint32_t threshold, A scale) {
  constexpr int64_t BLOCK = 512;  // hash apart from data: one loop of 64-bit and narrower lanes vectorises badly
  uint32_t u[BLOCK];
  for (int64_t i = 0; i < n; i += BLOCK) {
    const int64_t len = std::min(BLOCK, n - i);
#pragma omp simd
    for (int64_t j = 0; j < len; j++) u[j] = static_cast<uint32_t>(mix(start + static_cast<uint64_t>(i + j) * step) >> 40);
#pragma omp simd
    for (int64_t j = 0; j < len; j++) y[i + j] = down<T>(u[j] >= threshold ? up(x[i + j]) * scale : A(0));
  }
}

// sizes, strides: 4 each, outermost first; x is contiguous, strides are those of the global counter, `start` its first value.
Tensor dropout(Tensor x, int64_t start, int64_t threshold, double scale, std::vector<int64_t> sizes,
               std::vector<int64_t> strides) {
  Tensor y = torch::stable::empty_like(x);
  const int64_t inner = std::max<int64_t>(sizes[3], 1);
  dispatch(x, "dropout", [&]<class T>(T) {
    using A = acc_t<T>;
    const T* xp = in<T>(x);
    T* yp = out<T>(y);
    rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {  // row by row; the first and the last may be cut by the threads
        const int64_t column = i % inner, n = std::min(inner - column, end - i);
        uint64_t counter = static_cast<uint64_t>(start) + static_cast<uint64_t>(column) * static_cast<uint64_t>(strides[3]);
        int64_t row = i / inner;
        for (int dim = 2; dim >= 0; row /= sizes[dim], dim--)
          counter += static_cast<uint64_t>(row % sizes[dim]) * static_cast<uint64_t>(strides[dim]);
        run<T, A>(xp + i, yp + i, n, counter, static_cast<uint64_t>(strides[3]), static_cast<uint32_t>(threshold),
                  static_cast<A>(scale));
        i += n;
      }
    });
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
}  // namespace
}  // namespace interlace
