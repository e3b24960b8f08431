// jitter on CPU: y = x * (1 + (u - 2^23) * scale), u from a hash of the element's global index. Math: kernels/jitter.py
#include "hash.h"

namespace interlace {
namespace {

Tensor jitter(Tensor x, int64_t start, double scale, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  return by_place(x, "jitter", start, sizes, strides, [=]<class A>(A v, uint32_t u) {
    return v * (A(1) + static_cast<A>(static_cast<int32_t>(u) - (1 << 23)) * static_cast<A>(scale));
  });
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) { m.impl("jitter", TORCH_BOX(&jitter)); }
}  // namespace
}  // namespace interlace
