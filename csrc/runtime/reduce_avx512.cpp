// The sums for x86 CPUs with avx512, whatever the rest of the library is built for.
#include "heap.h"
#if defined(__x86_64__)
#include <immintrin.h>
#define INTERLACE_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c,avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512vl")
#endif
namespace interlace {
namespace avx512 {
#include "reduce.h"
}
Kernels kernels_avx512() { return avx512::make(); }
}  // namespace interlace
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
