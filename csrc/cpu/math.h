// exp_: e^x that vectorises under `omp simd` (libm's does not without -ffast-math)
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace interlace {
inline double exp_(double x) { return std::exp(x); }

// x = n ln2 + r, |r| <= ln2 / 2: e^x = 2^n p(r), p of degree 6. Over every float the error is <= 0.90 ulp (1.15 without fma).
// The scale 2^n is built by one shift, so the ends are cut: 0 below -87.68, where e^x is subnormal (< 8.2e-39), and inf
// above 88.37 (e^x > 2.4e38). NaN for NaN. 15 instructions.
inline float exp_(float x) {
  x = x < -88.0f ? -88.0f : x;  // n = -127: scale 0. Not std::max: a NaN must come through
  x = x > 88.5f ? 88.5f : x;    // n = 128: scale inf
  const float magic = 12583039.0f;  // 1.5 * 2^23 + 127: its sum with v has round(v) + 127 in the low bits
  const float shifted = x * 1.44269504f + magic, n = shifted - magic;
  const float r = (x - n * 0.693145752f) - n * 1.42860682e-6f;
  float p = 1.38145837e-3f;  // minimax for the relative error of e^r: 0.05 ulp before rounding, Taylor's would have 1
  p = p * r + 8.36872403e-3f;
  p = p * r + 4.1668389e-2f;
  p = p * r + 1.66665211e-1f;
  p = p * r + 4.9999994e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits <<= 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
}  // namespace interlace
