// defines: float types and their conversion to the type they are computed in, dispatch over dtypes, rows in parallel
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

namespace interlace {
using torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };  // not _Float16: GCC 12 leaves loops over it scalar without AVX512-FP16, 9 times slower

// Compute type: float for everything but double.
template <class T> struct Acc { using type = float; };
template <> struct Acc<double> { using type = double; };
template <class T> using acc_t = typename Acc<T>::type;

inline float up(float x) { return x; }
inline double up(double x) { return x; }
inline float up(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float up(fp16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13, sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float f = std::bit_cast<float>(magnitude) * 0x1p112f;  // the exponent's bias from 15 to 127; a subnormal becomes normal
  return std::bit_cast<float>(std::bit_cast<uint32_t>(f) | sign | (magnitude >= 0x0f800000 ? 0x7f800000 : 0));  // inf and NaN
}

template <class T> inline T down(acc_t<T> x) { return x; }  // round to nearest even; a NaN stays a (quiet) NaN
template <> inline bf16 down<bf16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0 : r)};
}
template <> inline fp16 down<fp16>(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  // below 2^-14 the adder rounds at half's smallest step, 2^-24
  const uint32_t small = std::bit_cast<uint32_t>(std::bit_cast<float>(m) + 0.5f) - 0x3f000000;
  const uint32_t normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  uint32_t h = m < 0x38800000 ? small : normal;
  h = m >= 0x477ff000 ? 0x7c00 : h;  // 65520 and more round to inf
  h = m > 0x7f800000 ? 0x7e00 : h;
  return {static_cast<uint16_t>(sign | h)};
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
