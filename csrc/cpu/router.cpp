// router on CPU: scores, choice, probs and sums of a token while its row is in L1. Math and shapes: kernels/router.py
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "math.h"

namespace interlace {
namespace {
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t PAD = 16;        // a row is padded with -inf to whole vectors: no remainder loops
constexpr int64_t CHUNK = 1024;    // tokens to a partial sum, whatever the number of threads
constexpr double TINY = 1e-20;

enum Score { SOFTMAX, SIGMOID, SQRTSOFTPLUS };
template <class A> constexpr A INF = std::numeric_limits<A>::infinity();
template <class A> using key_t = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <class A> constexpr key_t<A> LOW = std::numeric_limits<key_t<A>>::min();  // what may not be chosen

struct Options { int64_t K, groups, group_topk, group_best, sequences; bool norm, by_score; double scaling; };

// Integers in the order of floats: -0 = 0, a NaN the largest.
template <class A> inline key_t<A> ordered(A v) {
  constexpr key_t<A> top = std::numeric_limits<key_t<A>>::max();
  const key_t<A> bits = std::bit_cast<key_t<A>>(v + A(0));
  return v != v ? top : bits ^ ((bits >> (8 * sizeof(A) - 1)) & top);
}

// Vectors of keys. The work per choice is a chain of dependent steps: left to the compiler's loops it takes 3 times as long.
template <class Key> struct Lanes {
  typedef Key V __attribute__((vector_size(64)));
  static constexpr int64_t N = 64 / sizeof(Key);
  static V load(const Key* p) {
    V v;
    std::memcpy(&v, p, 64);
    return v;
  }
  static V iota() {
    V v;
    for (int64_t i = 0; i < N; i++) v[i] = static_cast<Key>(i);
    return v;
  }
  template <class Better> static Key reduce(V v, const Better& better) {
    for (int64_t width = N / 2; width; width /= 2) {
      const V other = __builtin_shuffle(v, iota() ^ static_cast<Key>(width));
      v = better(other, v) ? other : v;
    }
    return v[0];
  }
};

// The first place of the largest of n keys, whole vectors of them; it is struck out.
template <class Key> inline int64_t take(Key* key, int64_t n) {
  using L = Lanes<Key>;
  auto now = L::iota(), at = now, top = L::load(key);
  for (int64_t i = L::N; i < n; i += L::N) {
    const auto k = L::load(key + i);
    now += static_cast<Key>(L::N);
    at = k > top ? now : at;
    top = k > top ? k : top;
  }
  const Key best = L::reduce(top, [](auto a, auto b) { return a > b; });
  at = top == best ? at : std::numeric_limits<Key>::max() - (at ^ at);
  const Key first = L::reduce(at, [](auto a, auto b) { return a < b; });
  key[first] = std::numeric_limits<Key>::min();
  return first;
}

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// log(1 + z), 0 <= z <= 1: 2 atanh(z / (2 + z)), the series cut below half an ulp
inline float log1p_(float z) {
  const float w = z / (2 + z), r = w * w;
  return 2 * w * (1 + r * (1 / 3.0f + r * (1 / 5.0f + r * (1 / 7.0f + r * (1 / 9.0f + r * (1 / 11.0f + r * (1 / 13.0f)))))));
}
inline double log1p_(double z) { return std::log1p(z); }

// An independent score and its slope.
template <int F, class A> inline void unit(A x, A& s, A& slope) {
  const A z = exp_(x < 0 ? x : -x), over = A(1) / (A(1) + z);
  s = x < 0 ? z * over : over;
  slope = z * over * over;
  if constexpr (F == SQRTSOFTPLUS) {
    const A root = std::sqrt((x < 0 ? A(0) : x) + log1p_(z));
    slope = root > 0 ? s / (2 * root) : root;
    s = root;
  }
}

template <class A> struct Soft { A m, total; };

// e = exp(x - m) of a padded row; of -inf only: m = total = 0
template <class A> inline Soft<A> softmax(const A* x, A* e, int64_t n) {
  A m = -INF<A>, total = 0;
#pragma omp simd reduction(max : m)
  for (int64_t i = 0; i < n; i++) m = x[i] > m ? x[i] : m;  // passes over NaN: the sum carries it
  m = m == -INF<A> ? A(0) : m;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += e[i] = exp_(x[i] - m);
  return {m, total};
}

template <class A> inline A sum(const A* x, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; i++) total += x[i];
  return total;
}

template <class T> inline void load(const T* l, acc_t<T>* x, int64_t E) {
#pragma omp simd
  for (int64_t i = 0; i < E; i++) x[i] = up(l[i]);
}

// q and ds/dx over the divisor, of chosen logits; -inf where there is none. n: K, padded
template <int F, class A> inline void weigh(const A* xk, Soft<A> soft, bool norm, int64_t n, A* q, A* slope) {
  if constexpr (F == SOFTMAX) {
    if (norm) {
      soft = softmax(xk, q, n);
    } else {
#pragma omp simd
      for (int64_t k = 0; k < n; k++) q[k] = exp_(xk[k] - soft.m);
    }
    const A over = A(1) / soft.total;
#pragma omp simd
    for (int64_t k = 0; k < n; k++) slope[k] = q[k] = xk[k] == -INF<A> ? A(0) : q[k] * over;
  } else {
#pragma omp simd
    for (int64_t k = 0; k < n; k++) unit<F>(xk[k], q[k], slope[k]);
    const A total = norm ? sum(q, n) + A(TINY) : A(1);  // divided by, not multiplied with its inverse: one choice has 1, and no noise
    for (int64_t k = 0; k < n; k++) q[k] /= total, slope[k] /= total;
  }
}

// key = LOW outside the groups whose group_best largest v sum to most
template <class A> inline void keep_groups(const A* v, key_t<A>* key, int64_t E, const Options& o, key_t<A>* members, key_t<A>* score) {
  const int64_t size = E / o.groups;
  std::fill_n(members, padded(size), LOW<A>);
  for (int64_t g = 0; g < o.groups; g++) {
    std::copy_n(key + g * size, size, members);
    A total = 0;
    for (int64_t i = 0; i < o.group_best; i++) total += v[g * size + take(members, padded(size))];
    score[g] = ordered(total);
  }
  std::fill(score + o.groups, score + padded(o.groups), LOW<A>);
  for (int64_t i = 0; i < o.group_topk; i++) take(score, padded(o.groups));
  for (int64_t g = 0; g < o.groups; g++)
    if (score[g] != LOW<A>) std::fill_n(key + g * size, size, LOW<A>);
}

// What one thread needs for a token.
template <class A> struct Scratch {
  std::vector<A> x, e, s, d, slope, xk, q, slope_k;
  std::vector<key_t<A>> key, members, score;
  Scratch(int64_t E, int64_t K, int64_t groups)
      : x(padded(E), -INF<A>), e(x), s(x), d(x), slope(x), xk(padded(K), -INF<A>), q(xk), slope_k(xk), key(padded(E)), members(key),
        score(padded(groups)) {}
};

template <int F, class T> void fwd_tokens(int64_t begin, int64_t end, int64_t E, const T* logits, const acc_t<T>* bias, const bool* valid,
                                          const int32_t* given, const Options& o, int32_t* ids, acc_t<T>* probs, acc_t<T>* lse,
                                          double* sums, int32_t* counts) {
  using A = acc_t<T>;
  const int64_t P = padded(E), K = o.K;
  Scratch<A> w(E, K, o.groups);
  A *x = w.x.data(), *e = w.e.data(), *s = w.s.data(), *xk = w.xk.data();
  for (int64_t t = begin; t < end; t++) {
    const T* l = logits + t * E;
    int32_t* id = ids + t * K;
    if (valid && !valid[t]) {
      std::fill_n(id, K, -1);
      std::fill_n(probs + t * K, K, A(0));
      lse[t] = 0;
      continue;
    }
    load(l, x, E);
    const Soft<A> soft = softmax(x, e, P);
    lse[t] = soft.m + std::log(soft.total);
    double* acc = sums + t % o.sequences * E;  // fp32 in token order would lose 2 bits over 128 tokens
    if constexpr (F == SOFTMAX) {
      const A over = A(1) / soft.total;
#pragma omp simd
      for (int64_t i = 0; i < P; i++) s[i] = e[i] * over;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < P; i++) {
        A slope;
        unit<F>(x[i], s[i], slope);
      }
    }
    const A over = F == SOFTMAX ? A(1) : A(1) / (sum(s, P) + A(TINY));
#pragma omp simd
    for (int64_t i = 0; i < E; i++) acc[i] += double(s[i] * over);
    if (given) {
      std::copy_n(given + t * K, K, id);
    } else {
      const A* v = o.by_score ? s : x;
      if (bias) {
#pragma omp simd
        for (int64_t i = 0; i < E; i++) e[i] = v[i] + bias[i];
        v = e;
      }
      auto* key = w.key.data();
#pragma omp simd
      for (int64_t i = 0; i < P; i++) key[i] = i < E ? ordered(v[i]) : LOW<A>;
      if (o.groups > 1) keep_groups(v, key, E, o, w.members.data(), w.score.data());
      for (int64_t k = 0; k < K; k++) id[k] = static_cast<int32_t>(take(key, P));
    }
    int32_t* count = counts + t % o.sequences * E;
    for (int64_t k = 0; k < K; k++) {
      const bool on = id[k] >= 0 && id[k] < E;
      xk[k] = on ? x[id[k]] : -INF<A>;
      if (on) count[id[k]]++;
      else id[k] = -1;
    }
    weigh<F>(xk, soft, o.norm, padded(K), w.q.data(), w.slope_k.data());
    for (int64_t k = 0; k < K; k++) probs[t * K + k] = w.q[k] * static_cast<A>(o.scaling);
  }
}

// f(integral_constant<int, score>)
template <class F> inline void by_function(int64_t func, const F& f) {
  if (func == SOFTMAX) f(std::integral_constant<int, SOFTMAX>{});
  else if (func == SIGMOID) f(std::integral_constant<int, SIGMOID>{});
  else f(std::integral_constant<int, SQRTSOFTPLUS>{});
}

template <class T> inline const T* maybe(const std::optional<Tensor>& t) { return t ? in<T>(*t) : nullptr; }

Outputs fwd(Tensor logits, std::optional<Tensor> bias, std::optional<Tensor> valid, std::optional<Tensor> given, int64_t K, int64_t func,
            bool norm, bool by_score, int64_t groups, int64_t group_topk, int64_t group_best, double scaling, int64_t sequences) {
  const int64_t T_ = logits.size(0), E = logits.size(1), N = sequences * E;
  const ScalarType acc = logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const auto fresh = [&](std::initializer_list<int64_t> size, ScalarType type) { return torch::stable::new_empty(logits, size, type); };
  Outputs result{fresh({T_, K}, acc), fresh({sequences, E}, acc), fresh({T_}, acc), fresh({T_, K}, ScalarType::Int),
                 fresh({sequences, E}, ScalarType::Int)};
  auto& [probs, sums, lse, ids, counts] = result;
  const Options o{K, groups, group_topk, group_best, sequences, norm, by_score, scaling};
  const int64_t step = std::max(CHUNK, sequences), chunks = (T_ + step - 1) / step;
  dispatch(logits, "router", [&]<class T>(T) {
    using A = acc_t<T>;
    std::vector<double> part(chunks * N);
    std::vector<int32_t> counted(chunks * N);
    by_function(func, [&](auto f) {
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t c0, int64_t c1) {
        for (int64_t c = c0; c < c1; c++)
          fwd_tokens<f(), T>(c * step, std::min(T_, (c + 1) * step), E, in<T>(logits), maybe<A>(bias), maybe<bool>(valid),
                             maybe<int32_t>(given), o, out<int32_t>(ids), out<A>(probs), out<A>(lse), part.data() + c * N,
                             counted.data() + c * N);
      });
    });
    for (int64_t i = 0; i < N; i++) {
      double total = 0;
      int32_t count = 0;
      for (int64_t c = 0; c < chunks; c++) total += part[c * N + i], count += counted[c * N + i];
      out<A>(sums)[i] = static_cast<A>(total);
      out<int32_t>(counts)[i] = count;
    }
  });
  return result;
}

// Gradients that come; null where none does.
template <class A> struct Grads { const A *probs, *sums, *lse; };

template <int F, class T> void bwd_tokens(int64_t begin, int64_t end, int64_t E, const Grads<acc_t<T>>& g, const T* logits,
                                          const int32_t* ids, const bool* valid, const Options& o, T* dlogits) {
  using A = acc_t<T>;
  const int64_t P = padded(E), K = o.K;
  Scratch<A> w(E, K, 0);
  std::vector<A> dq(K);
  A *x = w.x.data(), *e = w.e.data(), *s = w.s.data(), *d = w.d.data(), *slope = w.slope.data(), *xk = w.xk.data(), *q = w.q.data();
  for (int64_t t = begin; t < end; t++) {
    T* out = dlogits + t * E;
    if (valid && !valid[t]) {
      std::memset(static_cast<void*>(out), 0, E * sizeof(T));
      continue;
    }
    const int32_t* id = ids + t * K;
    load(logits + t * E, x, E);
    Soft<A> soft{0, 1};
    if (F == SOFTMAX || g.lse) soft = softmax(x, e, P);
    A dense = g.lse ? g.lse[t] : A(0), mean = 0;  // dense: what softmax's gradient has in common for all columns
    if (g.probs) {
      for (int64_t k = 0; k < K; k++) {
        xk[k] = id[k] >= 0 ? x[id[k]] : -INF<A>;
        dq[k] = id[k] >= 0 ? g.probs[t * K + k] * static_cast<A>(o.scaling) : A(0);
      }
      weigh<F>(xk, soft, o.norm, padded(K), q, w.slope_k.data());
      for (int64_t k = 0; k < K; k++) mean += q[k] * dq[k];
      if (F == SOFTMAX && !o.norm) dense -= mean;
    }
    const A* D = g.sums ? g.sums + t % o.sequences * E : nullptr;
    if constexpr (F == SOFTMAX) {
      const A over = A(1) / soft.total;
      if (D) {
        A dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < E; i++) dot += e[i] * D[i];
        dense -= dot * over;
#pragma omp simd
        for (int64_t i = 0; i < E; i++) d[i] = e[i] * over * (D[i] + dense);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < E; i++) d[i] = e[i] * over * dense;
      }
    } else {
      if (D) {
        A dot = 0;
#pragma omp simd
        for (int64_t i = 0; i < P; i++) unit<F>(x[i], s[i], slope[i]);
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < E; i++) dot += s[i] * D[i];
        const A over = A(1) / (sum(s, P) + A(TINY));
        dot *= over;
#pragma omp simd
        for (int64_t i = 0; i < E; i++) d[i] = slope[i] * over * (D[i] - dot);
      } else {
        std::fill_n(d, E, A(0));
      }
      const A both = dense / soft.total;
      if (g.lse) {
#pragma omp simd
        for (int64_t i = 0; i < E; i++) d[i] += e[i] * both;
      }
    }
    for (int64_t k = 0; g.probs && k < K; k++)
      if (id[k] >= 0) d[id[k]] += w.slope_k[k] * (o.norm ? dq[k] - mean : dq[k]);
#pragma omp simd
    for (int64_t i = 0; i < E; i++) out[i] = down<T>(d[i]);
  }
}

Tensor bwd(std::optional<Tensor> dprobs, std::optional<Tensor> dsums, std::optional<Tensor> dlse, Tensor logits, Tensor ids,
           std::optional<Tensor> valid, int64_t func, bool norm, double scaling, int64_t sequences) {
  const int64_t T_ = logits.size(0), E = logits.size(1);
  Tensor dlogits = torch::stable::empty_like(logits);
  const Options o{ids.size(1), 1, 1, 1, sequences, norm, false, scaling};
  dispatch(logits, "router", [&]<class T>(T) {
    using A = acc_t<T>;
    const Grads<A> grads{maybe<A>(dprobs), maybe<A>(dsums), maybe<A>(dlse)};
    by_function(func, [&](auto f) {
      rows(T_, 4 * E, [&](int64_t begin, int64_t end) {
        bwd_tokens<f(), T>(begin, end, E, grads, in<T>(logits), in<int32_t>(ids), maybe<bool>(valid), o, out<T>(dlogits));
      });
    });
  });
  return dlogits;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("router_fwd", TORCH_BOX(&fwd));
  m.impl("router_bwd", TORCH_BOX(&bwd));
}
}  // namespace
}  // namespace interlace
