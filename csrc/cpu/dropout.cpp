// dropout on CPU: y = keep ? x * scale : 0, keep from a hash of the element's global index. Math: kernels/dropout.py
#include "hash.h"

namespace interlace {
namespace {

Tensor dropout(Tensor x, int64_t start, int64_t threshold, double scale, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  return by_place(x, "dropout", start, sizes, strides, [=]<class A>(A v, uint32_t u) {
    return u >= static_cast<uint32_t>(threshold) ? v * static_cast<A>(scale) : A(0);
  });
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) { m.impl("dropout", TORCH_BOX(&dropout)); }
}  // namespace
}  // namespace interlace
