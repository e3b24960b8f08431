// defines: exp_, an exponential that loops under `omp simd` vectorise without -ffast-math (a libm call stops them)
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace interlace {
inline double exp_(double x) { return std::exp(x); }

// exp(x) = 2^n * exp(r), |r| <= ln(2) / 2: at most 1 ulp off, subnormal results included; a NaN stays one.
inline float exp_(float x) {
  const float magic = 12582912.0f;       // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = x > 89.0f ? 89.0f : x;             // exp(89) is inf already, exp(-104) zero: n stays within [-150, 128]
  x = x < -104.0f ? -104.0f : x;
  const float t = x * 1.44269504088896341f + magic;
  const float n = t - magic;
  const float r = (x - n * 0.693145751953125f) - n * 1.428606765330187e-6f;  // ln(2) in two: the first product is exact
  float p = 1.98527617612853646e-4f;
  p = p * r + 1.39304355252534151e-3f;
  p = p * r + 8.33336077630519867e-3f;
  p = p * r + 4.16664853692054749e-2f;
  p = p * r + 1.66666671633720398e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const int32_t k = std::bit_cast<int32_t>(t) - std::bit_cast<int32_t>(magic);
  const int32_t half = k >> 1;           // two factors: 2^-150 and 2^128 have no float of their own
  return p * std::bit_cast<float>((half + 127) << 23) * std::bit_cast<float>((k - half + 127) << 23);
}
}  // namespace interlace
