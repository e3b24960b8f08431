// moe_rows: vectors of the compute type, and whole rows written past the cache
#pragma once
#include <array>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common.h"

namespace interlace {
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#else
constexpr int kBytes = 32;
#endif
template <class A> struct Vec { typedef A type __attribute__((vector_size(kBytes))); };
template <class A> using vec_t = typename Vec<A>::type;
template <class A> constexpr int kLanes = kBytes / sizeof(A);
typedef uint32_t words __attribute__((vector_size(kBytes)));
typedef uint16_t halves __attribute__((vector_size(kBytes / 2)));

template <class V, class U> inline V same_bits(const U& u) {
  static_assert(sizeof(V) == sizeof(U));
  V v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// kLanes elements in the compute type; the same arithmetic as up() and down() in common.h, lane by lane.
inline vec_t<float> load(const float* p) { vec_t<float> v; std::memcpy(&v, p, sizeof v); return v; }
inline vec_t<double> load(const double* p) { vec_t<double> v; std::memcpy(&v, p, sizeof v); return v; }
inline words load_halves(const void* p) { halves h; std::memcpy(&h, p, sizeof h); return __builtin_convertvector(h, words); }
inline vec_t<float> load(const bf16* p) { return same_bits<vec_t<float>>(load_halves(p) << 16); }
inline vec_t<float> load(const fp16* p) {
  const words h = load_halves(p), magnitude = (h & 0x7fff) << 13;
  const words f = same_bits<words>(same_bits<vec_t<float>>(magnitude) * 0x1p112f);
  return same_bits<vec_t<float>>(f | ((h & 0x8000) << 16) | ((words)(magnitude >= 0x0f800000) & 0x7f800000));
}

inline vec_t<float> pack(float, vec_t<float> v) { return v; }
inline vec_t<double> pack(double, vec_t<double> v) { return v; }
inline words round_bf16(vec_t<float> v) {  // the upper half of each lane is the bfloat16
  const words u = same_bits<words>(v), r = u + 0x7fff + ((u >> 16) & 1);
  return v != v ? words{} + 0x7fc00000 : r;
}
inline halves pack(bf16, vec_t<float> v) { return __builtin_convertvector(round_bf16(v) >> 16, halves); }
inline halves pack(fp16, vec_t<float> v) {
  const words u = same_bits<words>(v), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  const words small = same_bits<words>(same_bits<vec_t<float>>(m) + 0.5f) - 0x3f000000;
  const words normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  const words low = (words)(m < 0x38800000), inf = (words)(m >= 0x477ff000), nan = (words)(m > 0x7f800000);
  words h = (small & low) | (normal & ~low);
  h = (h & ~inf) | (inf & 0x7c00);
  h = (h & ~nan) | (nan & 0x7e00);
  return __builtin_convertvector(h | sign, halves);
}

// A vector to memory. Past: around the cache, `p` then aligned to its size.
template <bool Past, class V> inline void put(void* p, const V& v) {
#if defined(__AVX512F__)
  if constexpr (Past && sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), same_bits<__m512i>(v));
#endif
#if defined(__AVX__)
  if constexpr (Past && sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), same_bits<__m256i>(v));
#endif
#if defined(__SSE2__)
  if constexpr (Past && sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), same_bits<__m128i>(v));
#endif
  std::memcpy(p, &v, sizeof v);
}

// Two vectors of the compute type to memory as elements of T.
template <bool Past, class T> inline void put_pair(T* p, const vec_t<acc_t<T>>& a, const vec_t<acc_t<T>>& b) {
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, bf16>) {
    alignas(64) static constexpr auto odd = [] { std::array<uint16_t, 32> i{}; for (int n = 0; n < 32; n++) i[n] = 2 * n + 1; return i; }();
    const __m512i x = same_bits<__m512i>(round_bf16(a)), y = same_bits<__m512i>(round_bf16(b));
    return put<Past>(p, _mm512_permutex2var_epi16(x, _mm512_load_si512(odd.data()), y));
  }
#endif
  put<Past>(p, pack(T{}, a));
  put<Past>(p + kLanes<acc_t<T>>, pack(T{}, b));
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();  // other threads read what went past the cache
#endif
}

template <int Ahead = 2> inline void prefetch(const void* p) { __builtin_prefetch(p, 0, Ahead); }

// Output that the caches would not keep anyway goes past them: no line is read only to be overwritten.
inline bool past_cache(int64_t bytes) { return bytes >= (int64_t{4} << 20); }

typedef char line_t __attribute__((vector_size(kBytes)));

inline void copy_row(char* to, const char* from, int64_t n, bool past) {
  if (!past) {
    std::memcpy(to, from, n);
    return;
  }
  const int64_t head = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(to) & 63);
  std::memcpy(to, from, head);
  int64_t i = head;
  for (line_t a, b; i + 2 * kBytes <= n; i += 2 * kBytes) {
    std::memcpy(&a, from + i, kBytes);
    std::memcpy(&b, from + i + kBytes, kBytes);
    put<true>(to + i, a);
    put<true>(to + i + kBytes, b);
  }
  std::memcpy(to + i, from + i, n - i);
}

// Rows without a slot are zeros.
inline void zero_pads(char* y, const int32_t* slot_of_row, int64_t R, int64_t bytes) {
  rows(R, bytes / 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      if (slot_of_row[r] < 0) std::memset(y + r * bytes, 0, bytes);
  });
}
}  // namespace interlace
