// Whole rows, for dispatch.cpp: copied past the caches, and summed in groups. Part of reduce.h: no standard headers here either.

static void past(void* dst, const void* src, int64_t n) {
  auto d = static_cast<char*>(dst);
  auto s = static_cast<const char*>(src);
#if defined(INTERLACE_AVX512) || defined(INTERLACE_AVX2)
  int64_t head = -reinterpret_cast<intptr_t>(d) & 63;
  if (head > n) head = n;
  __builtin_memcpy(d, s, static_cast<size_t>(head));
  for (n -= head, d += head, s += head; n >= 128; n -= 128, d += 128, s += 128) {
#if defined(INTERLACE_AVX512)
    const __m512i a = _mm512_loadu_si512(s), b = _mm512_loadu_si512(s + 64);
    _mm512_stream_si512((__m512i*)d, a), _mm512_stream_si512((__m512i*)(d + 64), b);
#else
    const __m256i a = _mm256_loadu_si256((const __m256i*)s), b = _mm256_loadu_si256((const __m256i*)(s + 32)),
                  c = _mm256_loadu_si256((const __m256i*)(s + 64)), e = _mm256_loadu_si256((const __m256i*)(s + 96));
    _mm256_stream_si256((__m256i*)d, a), _mm256_stream_si256((__m256i*)(d + 32), b);
    _mm256_stream_si256((__m256i*)(d + 64), c), _mm256_stream_si256((__m256i*)(d + 96), e);
#endif
  }
#endif
  __builtin_memcpy(d, s, static_cast<size_t>(n));
}

// Four vectors in registers through all rows.
template <class O> struct Block {
  Vec a{}, b{}, c{}, d{};
  template <class R> inline void add(const R* r) {
    a = of(Sum{}, a, get(r)), b = of(Sum{}, b, get(r + V)), c = of(Sum{}, c, get(r + 2 * V)), d = of(Sum{}, d, get(r + 3 * V));
  }
  inline void add(const Block& x) { a = of(Sum{}, a, x.a), b = of(Sum{}, b, x.b), c = of(Sum{}, c, x.c), d = of(Sum{}, d, x.d); }
  inline void store(O* to, bool past) const {
    if (past) put_past(to, a), put_past(to + V, b), put_past(to + 2 * V, c), put_past(to + 3 * V, d);
    else put(to, a), put(to + V, b), put(to + 2 * V, c), put(to + 3 * V, d);
  }
};

template <class T, class O>
static void sum_rows(void* dst, const Group* group, int groups, int64_t n, const void* const* next, int ahead, bool past) {
  auto to = static_cast<O*>(dst);
  int64_t i = 0;
  for (; i + 4 * V <= n; i += 4 * V) {
    for (int k = 0; k < ahead; k++)
      for (int64_t j = 0; j < int64_t(4 * V * sizeof(T)); j += 64)
        __builtin_prefetch(static_cast<const char*>(next[k]) + i * int64_t(sizeof(T)) + j, 0, 2);
    Block<O> sum;
    for (const Group* g = group; g < group + groups; g++) {
      if (g->wide) {
        sum.add(static_cast<const float*>(g->row[0]) + i);
      } else if (g->n == 1) {
        sum.add(static_cast<const T*>(g->row[0]) + i);
      } else {
        Block<O> part;
        for (int k = 0; k < g->n; k++) part.add(static_cast<const T*>(g->row[k]) + i);
        sum.add(part);
      }
    }
    sum.store(to + i, past);
  }
  for (; i < n; i++) {
    float sum = 0;
    for (const Group* g = group; g < group + groups; g++) {
      float part = 0;
      for (int k = 0; k < g->n; k++) part += g->wide ? static_cast<const float*>(g->row[k])[i] : up(static_cast<const T*>(g->row[k])[i]);
      sum += part;
    }
    to[i] = down<O>(sum);
  }
}

static void sum_doubles(void* dst, const Group* group, int groups, int64_t n, const void* const*, int, bool) {
  auto to = static_cast<double*>(dst);
  constexpr int B = 8;
  for (int64_t i = 0; i < n; i += B) {
    const int m = n - i < B ? int(n - i) : B;
    double sum[B] = {};
    for (const Group* g = group; g < group + groups; g++) {
      double part[B] = {};
      for (int k = 0; k < g->n; k++)
        for (int j = 0; j < m; j++) part[j] += static_cast<const double*>(g->row[k])[i + j];
      for (int j = 0; j < m; j++) sum[j] += part[j];
    }
    for (int j = 0; j < m; j++) to[i + j] = sum[j];
  }
}
