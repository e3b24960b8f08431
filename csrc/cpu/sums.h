// sums: a sum over a row in independent lanes, in one fixed order
#pragma once
#include <cstdint>

namespace interlace {
constexpr int LANES = 64;  // four AVX-512 or eight AVX2 accumulators: one alone waits 4 cycles for each add

// Folded by halves: gcc would fold a vector lane by lane.
template <int W = LANES / 2, class A> inline A fold(A* s) {
#pragma omp simd
  for (int j = 0; j < W; j++) s[j] += s[j + W];
  if constexpr (W > 1) return fold<W / 2>(s);
  return s[0];
}

// f(0) + ... + f(n - 1)
template <class A, class F> inline A sum(int64_t n, const F& f) {
  A s[LANES] = {}, tail = 0;
  int64_t k = 0;
  for (; k + LANES <= n; k += LANES) {
#pragma omp simd
    for (int j = 0; j < LANES; j++) s[j] += f(k + j);
  }
  for (; k < n; k++) tail += f(k);
  return fold(s) + tail;
}
}  // namespace interlace
