// fresh: outputs straight from torch's allocator: through the dispatcher each costs 2.5 us more, of the 12 us of a small call
#pragma once
#include <vector>

#include "common.h"

namespace interlace {
// Contiguous, on the CPU; dtype as torch's own number.
inline Tensor fresh(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; i--) strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor fresh(const Tensor& x, const std::vector<int64_t>& sizes) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return fresh(sizes, dtype);
}

inline Tensor fresh_like(const Tensor& x) { return fresh(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end())); }

// In the type that x is computed in.
inline Tensor fresh_stat(const Tensor& x, const std::vector<int64_t>& sizes) {
  return fresh(sizes, x.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
}
}  // namespace interlace
