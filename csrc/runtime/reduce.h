// dst[i] = src[0][i] + src[1][i] + ... in rank order, in fp32 for bf16 and fp16, one rounding; or their maximum.
// Included once per instruction set by reduce_<isa>.cpp, inside a namespace of its own and under that target: no standard
// headers here, whose inline functions the linker would share between the instruction sets.
// dst may be one of the sources. also, where not null, gets a second copy of the result while it is in registers.

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
template <class T> struct AccOf { using type = T; };
template <> struct AccOf<bf16> { using type = float; };
template <> struct AccOf<fp16> { using type = float; };

template <class T> static inline T up(T x) { return x; }
static inline float up(fp16 x) { return float(__builtin_bit_cast(_Float16, x.bits)); }
static inline float up(bf16 x) { return __builtin_bit_cast(float, unsigned(x.bits) << 16); }
template <class T> static inline T down(typename AccOf<T>::type x) { return x; }
template <> inline bf16 down<bf16>(float x) {  // round to nearest even; a NaN stays a (quiet) NaN
  const unsigned u = __builtin_bit_cast(unsigned, x);
  const unsigned r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {static_cast<unsigned short>(x != x ? 0x7fc0 : r)};
}
template <> inline fp16 down<fp16>(float x) { return {__builtin_bit_cast(unsigned short, _Float16(x))}; }

struct Sum {
  template <class A> static inline A of(A a, A b) { return a + b; }
};
struct Max {  // a NaN wins, as in torch.maximum
  template <class A> static inline A of(A a, A b) { return (a > b || a != a) ? a : b; }
};

// Where gcc 12 does not vectorise the conversions (fp16) or gives up on the loop around them (bf16): by hand, V floats at a
// time. Without AVX2 V is 1.
#if defined(INTERLACE_AVX512)
constexpr int V = 16;
using Vec = __m512;
using Bits = __m512i;
static inline Vec get(const float* p) { return _mm512_loadu_ps(p); }
static inline Vec get(const bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline Vec get(const fp16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void put(float* p, Vec x) { _mm512_storeu_ps(p, x); }
using Half = __m256i;
static inline Half pack(bf16, Vec x) {
  const Bits u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  Bits r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(r);
}
static inline Half pack(fp16, Vec x) { return _mm512_cvtps_ph(x, 0); }
template <class T> static inline void put(T* p, Vec x) { _mm256_storeu_si256((Half*)p, pack(T{}, x)); }
static inline void put_past(float* p, Vec x) { _mm512_stream_ps(p, x); }
template <class T> static inline void put_past(T* p, Vec x) { _mm256_stream_si256((Half*)p, pack(T{}, x)); }
static inline Vec of(Sum, Vec a, Vec b) { return _mm512_add_ps(a, b); }
static inline Vec of(Max, Vec a, Vec b) {
  const __mmask16 keep = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b, keep, a);
}
#elif defined(INTERLACE_AVX2)
constexpr int V = 8;
using Vec = __m256;
using Bits = __m256i;
static inline Vec get(const float* p) { return _mm256_loadu_ps(p); }
static inline Vec get(const bf16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline Vec get(const fp16* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void put(float* p, Vec x) { _mm256_storeu_ps(p, x); }
using Half = __m128i;
static inline Half pack(bf16, Vec x) {
  const Bits u = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  Bits r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  return _mm256_castsi256_si128(r);
}
static inline Half pack(fp16, Vec x) { return _mm256_cvtps_ph(x, 0); }
template <class T> static inline void put(T* p, Vec x) { _mm_storeu_si128((Half*)p, pack(T{}, x)); }
static inline void put_past(float* p, Vec x) { _mm256_stream_ps(p, x); }
template <class T> static inline void put_past(T* p, Vec x) { _mm_stream_si128((Half*)p, pack(T{}, x)); }
static inline Vec of(Sum, Vec a, Vec b) { return _mm256_add_ps(a, b); }
static inline Vec of(Max, Vec a, Vec b) {
  const Vec keep = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_ps(b, a, keep);
}
#else
constexpr int V = 1;
using Vec = float;
template <class T> static inline Vec get(const T* p) { return up(*p); }
template <class T> static inline void put(T* p, Vec x) { *p = down<T>(x); }
template <class T> static inline void put_past(T* p, Vec x) { *p = down<T>(x); }
template <class F> static inline Vec of(F, Vec a, Vec b) { return F::of(a, b); }
#endif

template <class T, class F, int W, bool ALSO> static void reduce_few(T* dst, T* also, const T* const* src, long n) {
  const T *a = src[0], *b = src[1], *c = src[W > 2 ? 2 : 0], *d = src[W > 3 ? 3 : 0];
  long i = 0;
  if constexpr (__is_same(typename AccOf<T>::type, float))
    for (; i + V <= n; i += V) {
      Vec s = of(F{}, get(a + i), get(b + i));
      if (W > 2) s = of(F{}, s, get(c + i));
      if (W > 3) s = of(F{}, s, get(d + i));
      put(dst + i, s);
      if (ALSO) put(also + i, s);
    }
  for (; i < n; i++) {
    auto s = F::of(up(a[i]), up(b[i]));
    if (W > 2) s = F::of(s, up(c[i]));
    if (W > 3) s = F::of(s, up(d[i]));
    const T r = down<T>(s);
    dst[i] = r;
    if (ALSO) also[i] = r;
  }
}

// Any number of ranks: V elements at a time through all of them.
template <class T, class F> static void reduce_many(T* dst, T* also, const T* const* src, int world, long n) {
  long i = 0;
  if constexpr (__is_same(typename AccOf<T>::type, float))
    for (; i + V <= n; i += V) {
      Vec s = get(src[0] + i);
      for (int r = 1; r < world; r++) s = of(F{}, s, get(src[r] + i));
      put(dst + i, s);
      if (also) put(also + i, s);
    }
  for (; i < n; i++) {
    auto s = up(src[0][i]);
    for (int r = 1; r < world; r++) s = F::of(s, up(src[r][i]));
    dst[i] = down<T>(s);
    if (also) also[i] = dst[i];
  }
}

template <class T, class F> static void reduce(void* dst, void* also, const void* const* src, int world, int64_t n) {
  auto d = static_cast<T*>(dst), e = static_cast<T*>(also);
  auto s = reinterpret_cast<const T* const*>(src);
  if (world == 2) return e ? reduce_few<T, F, 2, true>(d, e, s, n) : reduce_few<T, F, 2, false>(d, e, s, n);
  if (world == 3) return e ? reduce_few<T, F, 3, true>(d, e, s, n) : reduce_few<T, F, 3, false>(d, e, s, n);
  if (world == 4) return e ? reduce_few<T, F, 4, true>(d, e, s, n) : reduce_few<T, F, 4, false>(d, e, s, n);
  reduce_many<T, F>(d, e, s, world, n);
}

// Not memcpy: glibc's choice of rep movsb, and of streaming stores from 3/4 of L3 on, depends on version and machine.
static void copy(void* dst, const void* src, int64_t n) {
  auto d = static_cast<char*>(dst);
  auto s = static_cast<const char*>(src);
#if defined(INTERLACE_AVX512)
  for (; n >= 256; n -= 256, d += 256, s += 256) {
    const __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 64), c = _mm512_loadu_si512(s + 128),
                  e = _mm512_loadu_si512(s + 192);
    _mm512_storeu_si512(d, a), _mm512_storeu_si512(d + 64, b), _mm512_storeu_si512(d + 128, c), _mm512_storeu_si512(d + 192, e);
  }
#elif defined(INTERLACE_AVX2)
  for (; n >= 128; n -= 128, d += 128, s += 128) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)s), b = _mm256_loadu_si256((const __m256i*)(s + 32)),
                  c = _mm256_loadu_si256((const __m256i*)(s + 64)), e = _mm256_loadu_si256((const __m256i*)(s + 96));
    _mm256_storeu_si256((__m256i*)d, a), _mm256_storeu_si256((__m256i*)(d + 32), b);
    _mm256_storeu_si256((__m256i*)(d + 64), c), _mm256_storeu_si256((__m256i*)(d + 96), e);
  }
#endif
  __builtin_memcpy(d, s, static_cast<size_t>(n));
}

// The same past the caches, for results too large to stay in them: no line is read in before it is overwritten.
static void stream(void* dst, const void* src, int64_t n) {
#if defined(INTERLACE_AVX512)
  auto d = static_cast<char*>(dst);
  auto s = static_cast<const char*>(src);
  const int64_t head = -reinterpret_cast<intptr_t>(d) & 63;
  if (n >= 4096) {
    __builtin_memcpy(d, s, static_cast<size_t>(head));
    for (n -= head, d += head, s += head; n >= 256; n -= 256, d += 256, s += 256) {
      const __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 64), c = _mm512_loadu_si512(s + 128),
                    e = _mm512_loadu_si512(s + 192);
      _mm512_stream_si512((__m512i*)d, a), _mm512_stream_si512((__m512i*)(d + 64), b);
      _mm512_stream_si512((__m512i*)(d + 128), c), _mm512_stream_si512((__m512i*)(d + 192), e);
    }
    _mm_sfence();
  }
  __builtin_memcpy(d, s, static_cast<size_t>(n));
#else
  copy(dst, src, n);
#endif
}

template <class F> static void fill(Reduce* table) {
  table[0] = reduce<double, F>, table[1] = reduce<float, F>, table[2] = reduce<bf16, F>, table[3] = reduce<fp16, F>;
  table[4] = reduce<long long, F>, table[5] = reduce<int, F>;
}
#include "rows.h"

static Kernels make() {
  Kernels k;
  k.copy = copy, k.stream = stream, k.past = past;
  k.wide[0] = k.total[0] = sum_doubles, k.wide[1] = k.total[1] = sum_rows<float, float>;
  k.wide[2] = sum_rows<bf16, float>, k.total[2] = sum_rows<bf16, bf16>;
  k.wide[3] = sum_rows<fp16, float>, k.total[3] = sum_rows<fp16, fp16>;
  fill<Sum>(k.reduce[0]), fill<Max>(k.reduce[1]);
  return k;
}
