// The sums for x86 CPUs with avx2, whatever the rest of the library is built for.
#include "heap.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define INTERLACE_AVX2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif
namespace interlace {
namespace avx2 {
#include "reduce.h"
}
Kernels kernels_avx2() { return avx2::make(); }
}  // namespace interlace
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
