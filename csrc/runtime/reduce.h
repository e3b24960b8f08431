// dst[i] = src[0][i] + src[1][i] + ... in rank order, in fp32 for bf16 and fp16, one rounding; or their maximum.
// Included once per instruction set by reduce_<isa>.cpp, inside a namespace of its own and under that target: no standard
// headers here, whose inline functions the linker would share between the instruction sets.
// dst may be one of the sources.

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };
template <class T> struct AccOf { using type = T; };
template <> struct AccOf<bf16> { using type = float; };
template <> struct AccOf<fp16> { using type = float; };

template <class T> static inline T up(T x) { return x; }
static inline float up(bf16 x) { return __builtin_bit_cast(float, unsigned(x.bits) << 16); }
template <class T> static inline T down(typename AccOf<T>::type x) { return x; }
template <> inline bf16 down<bf16>(float x) {  // round to nearest even; a NaN stays a (quiet) NaN
  const unsigned u = __builtin_bit_cast(unsigned, x);
  const unsigned r = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return {static_cast<unsigned short>(x != x ? 0x7fc0 : r)};
}

struct Sum {
  template <class A> static inline A of(A a, A b) { return a + b; }
};
struct Max {  // a NaN wins, as in torch.maximum
  template <class A> static inline A of(A a, A b) { return (a > b || a != a) ? a : b; }
};

template <class T, class F, int W> static void reduce_few(T* dst, const T* const* src, long n) {
  const T *a = src[0], *b = src[1], *c = src[W > 2 ? 2 : 0], *d = src[W > 3 ? 3 : 0];
#pragma omp simd
  for (long i = 0; i < n; i++) {
    auto s = F::of(up(a[i]), up(b[i]));
    if (W > 2) s = F::of(s, up(c[i]));
    if (W > 3) s = F::of(s, up(d[i]));
    dst[i] = down<T>(s);
  }
}

// fp16: gcc 12 does not vectorise the conversions, so blocks go through fp32 in L1.
static inline void load(float* acc, const fp16* x, long n) {
  long i = 0;
#if defined(INTERLACE_AVX512)
  for (; i + 16 <= n; i += 16) _mm512_storeu_ps(acc + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(x + i))));
#elif defined(INTERLACE_AVX2)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(acc + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
  for (; i < n; i++) acc[i] = float(__builtin_bit_cast(_Float16, x[i].bits));
}
static inline void store(fp16* x, const float* acc, long n) {
  long i = 0;
#if defined(INTERLACE_AVX512)
  for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(x + i), _mm512_cvtps_ph(_mm512_loadu_ps(acc + i), 0));
#elif defined(INTERLACE_AVX2)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(x + i), _mm256_cvtps_ph(_mm256_loadu_ps(acc + i), 0));
#endif
  for (; i < n; i++) x[i].bits = __builtin_bit_cast(unsigned short, _Float16(acc[i]));
}
template <class T, class A> static inline void load(A* acc, const T* x, long n) {
#pragma omp simd
  for (long i = 0; i < n; i++) acc[i] = up(x[i]);
}
template <class T, class A> static inline void store(T* x, const A* acc, long n) {
#pragma omp simd
  for (long i = 0; i < n; i++) x[i] = down<T>(acc[i]);
}

template <class T, class F> static void reduce_many(T* dst, const T* const* src, int world, long n) {
  using A = typename AccOf<T>::type;
  constexpr long B = 1024;
  alignas(64) A acc[B], next[B];
  for (long at = 0; at < n; at += B) {
    const long m = n - at < B ? n - at : B;
    load(acc, src[0] + at, m);
    for (int r = 1; r < world; r++) {
      load(next, src[r] + at, m);
#pragma omp simd
      for (long i = 0; i < m; i++) acc[i] = F::of(acc[i], next[i]);
    }
    store(dst + at, acc, m);
  }
}

template <class T, class F> static void reduce(void* dst, const void* const* src, int world, int64_t n) {
  auto d = static_cast<T*>(dst);
  auto s = reinterpret_cast<const T* const*>(src);
  if constexpr (sizeof(T) == 2 && __is_same(T, fp16)) return reduce_many<T, F>(d, s, world, n);
  else switch (world) {
    case 2: return reduce_few<T, F, 2>(d, s, n);
    case 3: return reduce_few<T, F, 3>(d, s, n);
    case 4: return reduce_few<T, F, 4>(d, s, n);
    default: return reduce_many<T, F>(d, s, world, n);
  }
}

template <class F> static void fill(Reduce* table) {
  table[0] = reduce<double, F>, table[1] = reduce<float, F>, table[2] = reduce<bf16, F>, table[3] = reduce<fp16, F>;
  table[4] = reduce<long long, F>, table[5] = reduce<int, F>;
}
static Kernels make() {
  Kernels k;
  fill<Sum>(k.reduce[0]), fill<Max>(k.reduce[1]);
  return k;
}
