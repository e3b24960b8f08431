// moe_rows: vectors of the compute type, and whole rows written past the cache
#pragma once
#include <cstring>

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

template <class V, class U> inline V same_bits(const U& u) {
  static_assert(sizeof(V) == sizeof(U));
  V v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// 2 kLanes elements in the compute type. Of 16-bit types `a` has the even ones and `b` the odd: a shift and a mask to widen and to narrow
// them, where halves in order take shuffles. The same arithmetic as up() and down() in common.h, lane by lane.
template <class A> struct Pair {
  vec_t<A> a{}, b{};
  void add(A p, const Pair& x) { a += p * x.a, b += p * x.b; }
};

template <class V> inline V at(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class A> inline Pair<A> load(const A* p) { return {at<vec_t<A>>(p), at<vec_t<A>>(p + kLanes<A>)}; }
inline Pair<float> load(const bf16* p) {
  const words w = at<words>(p);
  return {same_bits<vec_t<float>>(w << 16), same_bits<vec_t<float>>(w & 0xffff0000)};
}
inline vec_t<float> widen_half(words h) {
  const words magnitude = (h & 0x7fff) << 13, f = same_bits<words>(same_bits<vec_t<float>>(magnitude) * 0x1p112f);
  return same_bits<vec_t<float>>(f | ((h & 0x8000) << 16) | ((words)(magnitude >= 0x0f800000) & 0x7f800000));
}
inline Pair<float> load(const fp16* p) {
  const words w = at<words>(p);
  return {widen_half(w & 0xffff), widen_half(w >> 16)};
}

inline words round_bf16(vec_t<float> v) {  // the upper half of each lane is the bfloat16
  const words u = same_bits<words>(v), r = u + 0x7fff + ((u >> 16) & 1);
  return v != v ? words{} + 0x7fc00000 : r;
}
inline words round_half(vec_t<float> v) {  // the lower half of each lane is the number
  const words u = same_bits<words>(v), sign = (u >> 16) & 0x8000, m = u & 0x7fffffff;
  const words small = same_bits<words>(same_bits<vec_t<float>>(m) + 0.5f) - 0x3f000000;
  const words normal = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
  const words low = (words)(m < 0x38800000), inf = (words)(m >= 0x477ff000), nan = (words)(m > 0x7f800000);
  words h = (small & low) | (normal & ~low);
  h = (h & ~inf) | (inf & 0x7c00);
  h = (h & ~nan) | (nan & 0x7e00);
  return h | sign;
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

// What load() gave, computed with, back to memory as elements of T.
template <bool Past, class A> inline void put(A* p, const Pair<A>& x) {
  put<Past>(static_cast<void*>(p), x.a);
  put<Past>(static_cast<void*>(p + kLanes<A>), x.b);
}
template <bool Past> inline void put(bf16* p, const Pair<float>& x) {
  put<Past>(static_cast<void*>(p), words((round_bf16(x.a) >> 16) | (round_bf16(x.b) & 0xffff0000)));
}
template <bool Past> inline void put(fp16* p, const Pair<float>& x) {
  put<Past>(static_cast<void*>(p), words(round_half(x.a) | (round_half(x.b) << 16)));
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
