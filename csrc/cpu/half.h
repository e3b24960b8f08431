// widen, narrow: up and down of common.h with float16 done on its bits, because GCC 12 leaves loops over _Float16 scalar
// without AVX512-FP16: 9 times slower in cross_entropy. The same values bit for bit, but for a NaN's payload.
#pragma once
#include "common.h"

namespace interlace {
template <class T> inline acc_t<T> widen(T x) { return up(x); }
template <> inline float widen<fp16>(fp16 x) {
  uint16_t h;
  std::memcpy(&h, &x, 2);
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13, sign = static_cast<uint32_t>(h & 0x8000) << 16;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;  // the exponent's bias from 15 to 127; makes a subnormal normal too
  uint32_t u;
  std::memcpy(&u, &f, 4);
  u |= sign | (magnitude >= 0x0f800000 ? 0x7f800000 : 0);  // inf and NaN
  std::memcpy(&f, &u, 4);
  return f;
}

template <class T> inline T narrow(acc_t<T> x) { return down<T>(x); }
template <> inline fp16 narrow<fp16>(float x) {  // round to nearest even
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  float tiny;
  std::memcpy(&tiny, &m, 4);
  tiny += 0.5f;  // below 2^-14: the adder rounds at half's smallest step, 2^-24
  uint32_t small;
  std::memcpy(&small, &tiny, 4);
  small -= 0x3f000000;
  const uint32_t normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  uint32_t h = m < 0x38800000 ? small : normal;
  h = m >= 0x477ff000 ? 0x7c00 : h;  // 65520 and more round to inf
  h = m > 0x7f800000 ? 0x7e00 : h;
  const uint16_t bits = static_cast<uint16_t>(sign | h);
  fp16 y;
  std::memcpy(&y, &bits, 2);
  return y;
}
}  // namespace interlace
