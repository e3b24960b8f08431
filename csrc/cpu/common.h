// defines: float types and their conversion to the type they are computed in, dispatch over dtypes, rows in parallel
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace interlace {
using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

struct bf16 { uint16_t bits; };
struct fp16 { _Float16 value; };

// Compute type: float for everything but double.
template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };
template <class T> using acc_t = typename Acc<T>::type;

inline float up(float x) { return x; }
inline double up(double x) { return x; }
inline float up(fp16 x) { return static_cast<float>(x.value); }
inline float up(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
template <class T> inline T down(acc_t<T> x) { return x; }
template <> inline fp16 down<fp16>(float x) { return {static_cast<_Float16>(x)}; }
template <> inline bf16 down<bf16>(float x) {  // round to nearest even; a NaN stays a (quiet) NaN
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : r)};
}

// f(T{}) for the element type of t: float32, float64, bfloat16, float16.
template <class F> inline void dispatch(const Tensor& t, const char* op, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

template <class T> inline const T* in(const Tensor& t) { return static_cast<const T*>(t.data_ptr()); }
template <class T> inline T* out(const Tensor& t) { return static_cast<T*>(t.data_ptr()); }

// f(begin, end) over rows of `work` elements each, on torch's threads; small inputs stay on one.
template <class F> inline void rows(int64_t n, int64_t work, const F& f) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, 16384 / std::max<int64_t>(work, 1)), f);
}
}  // namespace interlace
