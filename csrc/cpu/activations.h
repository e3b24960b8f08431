// activations: value and slope of silu and both gelus at once; what is not used, the compiler drops. Vectorises under `omp simd`
#pragma once
#include "math.h"

namespace interlace {
template <class A> struct Point { A y, slope; };

struct Silu {
  template <class A> static Point<A> at(A x) {
    const A s = A(1) / (A(1) + exp_(-x));
    return {x * s, s * (A(1) + x * (A(1) - s))};
  }
};

// 0.5 (1 + tanh u) = 1 / (1 + exp(-2u)): one exponential, no tanh, of -|2u| so that s (1 - s) does not cancel. Past 20 the value is x or 0,
// and x^3 may overflow: c stops there.
struct GeluTanh {
  template <class A> static Point<A> at(A x) {
    A c = x < A(-20) ? A(-20) : x;
    c = c > A(20) ? A(20) : c;  // a NaN comes through
    const A k = A(1.5957691216057308) * c, q = A(0.044715) * c * c, z = k * (A(1) + q);  // z = 2u
    const A e = exp_(z < A(0) ? z : -z), r = A(1) / (A(1) + e), s = z < A(0) ? e * r : r;
    return {x * s, s + k * (A(1) + A(3) * q) * (e * r * r)};
  }
};

// erfc(|x| / sqrt2) / 2 in one exponential that the slope needs anyway: exp(-x^2 / 2) t P(t), t = 1 / (1 + 0.3 |x| / sqrt2); P minimax,
// 2e-8 before rounding, 4.5e-7 after it. Unlike 1 + erf it does not cancel where x is negative.
inline float half_erfc(float magnitude, float e) {
  const float t = 1.0f / (1.0f + 0.212132034f * magnitude);
  float p = -0.0647614810f;
  p = p * t + 0.242781765f;
  p = p * t - 0.256139423f;
  p = p * t + 0.273860509f;
  p = p * t - 0.0473257544f;
  p = p * t + 0.107463221f;
  p = p * t + 0.0741695285f;
  p = p * t + 0.0853576225f;
  p = p * t + 0.084594002f;
  return p * t * e;
}
inline double half_erfc(double magnitude, double) { return 0.5 * std::erfc(magnitude * 0.70710678118654752); }

struct Gelu {
  template <class A> static Point<A> at(A x) {
    const A m = x < A(0) ? -x : x, e = exp_(A(-0.5) * x * x), tail = half_erfc(m, e), cdf = x < A(0) ? tail : A(1) - tail;
    return {x * cdf, cdf + x * (A(0.3989422804014327) * e)};
  }
};

// f(Silu{}) for an activation's number: the order of ACTIVATIONS in kernels/gated.py.
template <class F> inline void activation(int64_t number, const F& f) {
  if (number == 0) return f(Silu{});
  if (number == 1) return f(Gelu{});
  f(GeluTanh{});
}
}  // namespace interlace
