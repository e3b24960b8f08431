// defines: uniform numbers that depend on a seed and an element's place in the global tensor (math: kernels/dropout.py), and
// the walk over a shard that hands them out
#pragma once
#include <vector>

#include "common.h"

namespace interlace {
inline uint64_t mix(uint64_t z) {  // the finaliser of splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// y = f(x, u) elementwise, u the top 24 bits of the hash. sizes, strides: 4 each, outermost first; x is contiguous, strides are those
// of the global counter, `start` its first value. f takes and gives numbers of the compute type.
template <class F>
Tensor by_place(const Tensor& x, const char* op, int64_t start, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                const F& f) {
  Tensor y = torch::stable::empty_like(x);
  const int64_t inner = std::max<int64_t>(sizes[3], 1);
  const uint64_t step = static_cast<uint64_t>(strides[3]);
  dispatch(x, op, [&]<class T>(T) {
    const T* xp = in<T>(x);
    T* yp = out<T>(y);
    const auto run = [&](const T* from, T* to, int64_t n, uint64_t counter) {
      constexpr int64_t BLOCK = 512;  // hash apart from data: one loop of 64-bit and narrower lanes vectorises badly
      uint32_t u[BLOCK];
      for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t len = std::min(BLOCK, n - i);
#pragma omp simd
        for (int64_t j = 0; j < len; j++) u[j] = static_cast<uint32_t>(mix(counter + static_cast<uint64_t>(i + j) * step) >> 40);
#pragma omp simd
        for (int64_t j = 0; j < len; j++) to[i + j] = down<T>(f(up(from[i + j]), u[j]));
      }
    };
    rows(x.numel(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {  // row by row; the first and the last may be cut by the threads
        const int64_t column = i % inner, n = std::min(inner - column, end - i);
        uint64_t counter = static_cast<uint64_t>(start) + static_cast<uint64_t>(column) * step;
        int64_t row = i / inner;
        for (int dim = 2; dim >= 0; row /= sizes[dim], dim--)
          counter += static_cast<uint64_t>(row % sizes[dim]) * static_cast<uint64_t>(strides[dim]);
        run(xp + i, yp + i, n, counter);
        i += n;
      }
    });
  });
  return y;
}
}  // namespace interlace
