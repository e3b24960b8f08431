// The sums for any CPU of this architecture, and the choice between the instruction sets.
#include "heap.h"

namespace interlace {
namespace base {
#include "reduce.h"
}
Kernels kernels_avx2(), kernels_avx512();

const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return kernels_avx512();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kernels_avx2();
#endif
    return base::make();
  }();
  return chosen;
}
}  // namespace interlace
