// grouped_gemm on CPU: one product for every expert that has rows. Math and shapes: kernels/grouped_gemm.py
//
// The product in float is ours (gemm.h) where it is faster than torch's: it packs its operands anyway, so a gather costs it nothing, and
// 16-bit numbers are widened on the way. Everywhere else torch's, of a gathered or widened copy.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>  // mm and addmm, past the dispatcher

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "common.h"
#include "gemm.h"

namespace interlace {
namespace {
// The type a product runs in. Without instructions for them torch multiplies 16-bit numbers at 1 to 17 GFLOP/s: those go
// through float, as in kernels/comm/gemm.py.
template <class T> struct Product { using type = acc_t<T>; };
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
template <> struct Product<bf16> { using type = bf16; };
#endif
#if defined(__AVX512FP16__) || defined(__AMX_FP16__)
template <> struct Product<fp16> { using type = fp16; };
#endif
template <class T> using product_t = typename Product<T>::type;

template <class P> constexpr ScalarType kType = std::is_same_v<P, float>    ? ScalarType::Float
                                                : std::is_same_v<P, double> ? ScalarType::Double
                                                : std::is_same_v<P, bf16>   ? ScalarType::BFloat16
                                                                            : ScalarType::Half;

// Rows a product is made of. oneDNN compiles a 16-bit product anew for every size, 0.6 ms against 0.3 ms for 200 x 256 x 512, and
// routing brings new sizes with every step: 16 sizes an octave stay in its cache, for 3% more rows.
template <class P> inline int64_t padded(int64_t n) {
  if (sizeof(P) > 2) return n;
  const int64_t step = std::max<int64_t>(1, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(n))) / 16);
  return (n + step - 1) / step * step;
}

// A matrix in memory that others own.
template <class P> struct Matrix {
  P* data;
  int64_t rows, cols;
  bool flip = false;  // stored as [cols, rows]
  Tensor tensor() const {
    const int64_t size[] = {rows, cols}, stride[] = {flip ? 1 : cols, flip ? rows : 1};
    return torch::stable::from_blob(const_cast<std::remove_const_t<P>*>(data), {size, 2}, {stride, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), kType<std::remove_const_t<P>>);
  }
};

// c = a b, or c += a b
template <class P> void product(const Matrix<P>& c, const Matrix<const P>& a, const Matrix<const P>& b, bool add) {
  const Tensor to = c.tensor(), x = a.tensor(), y = b.tensor();
  const AOTITorchError failed = add ? aoti_torch_cpu_addmm_out(to.get(), to.get(), x.get(), y.get(), 1.0, 1.0)
                                    : aoti_torch_cpu_mm_out(to.get(), x.get(), y.get());
  STD_TORCH_CHECK(failed == 0, "grouped_gemm: the product of one expert failed, got code ", failed);
}

// Memory for the rows of one expert, kept from expert to expert.
template <class P> class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}
  P* get(int64_t n) {
    if (n > size_) held_ = torch::stable::new_empty(like_, {n}, kType<P>), size_ = n;
    return size_ ? out<P>(*held_) : nullptr;
  }

 private:
  Tensor like_;
  std::optional<Tensor> held_;
  int64_t size_ = 0;
};

template <class P, class T> void convert(const T* from, P* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    if constexpr (std::is_same_v<P, T>) to[i] = from[i];
    else if constexpr (sizeof(P) > sizeof(T)) to[i] = up(from[i]);
    else to[i] = down<P>(from[i]);
  }
}

// Where a side's rows are: rows first .. of data, or those of the tokens that have these rows in the plan (-1: zeros).
template <class T> struct Side {
  const T* data;
  int64_t width, R;
  std::vector<int32_t> token;  // of each row; empty: no gather
  tiles::View view(int64_t first, int64_t n) const {
    if (token.empty()) return {data + first * width, n, width, width, 1};
    return {data, n, width, width, 1, token.data() + first};
  }
  // n rows and up to `all` others: zeros, or whatever comes behind where the caller throws it away.
  template <class P> Matrix<const P> rows_of(int64_t first, int64_t n, int64_t all, bool zeros, Scratch<P>& scratch) const {
    if constexpr (std::is_same_v<P, T>)
      if (token.empty() && (n == all || (!zeros && first + all <= R))) return {data + first * width, all, width};
    P* to = scratch.get(all * width);
    rows(all, width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t r = i >= n ? -1 : token.empty() ? first + i : token[first + i];
        if (r < 0) std::fill_n(to + i * width, width, P{});
        else convert<P>(data + r * width, to + i * width, width);
      }
    });
    return {to, all, width};
  }
};

template <class T> Side<T> side(const Tensor& t, const std::optional<Tensor>& slots, int64_t topk) {
  Side<T> made{in<T>(t), t.size(1), (slots ? *slots : t).size(0), {}};
  if (!slots) return made;
  made.token.assign(in<int32_t>(*slots), in<int32_t>(*slots) + made.R);
  for (int32_t& r : made.token) r = r < 0 ? -1 : r / static_cast<int32_t>(topk);
  return made;
}

// Whether the product in P of n rows of T, of which each sum has `depth` terms, is ours. Of few rows, packing a weight that torch reads as
// it lies (straight: dgrad) costs more than our tiles gain: 67 GFLOP/s against 72 at 64 rows, 82 against 78 at 128, 97 against 85 at 512.
template <class P, class T> inline bool ours(int64_t n, int64_t depth, bool straight = false) {
  return std::is_same_v<P, float> && tiles::ahead<T>() && n >= (straight && std::is_same_v<T, float> ? 128 : 32) && depth > 0;
}

const int32_t* checked(const Tensor& offsets, int64_t E, int64_t R) {
  const int32_t* at = in<int32_t>(offsets);
  bool fine = at[0] == 0 && at[E] <= R;
  for (int64_t e = 0; e < E; e++) fine &= at[e] <= at[e + 1];
  STD_TORCH_CHECK(fine, "grouped_gemm: offsets must rise from 0 to at most the number of rows, ", R, ", got 0th ", at[0],
                  " and last ", at[E], "; take them from route_plan");
  return at;
}

// Experts of few rows run in parallel, since one small product does not keep the threads busy.
inline bool side_by_side(int64_t E, int64_t R) { return R < 64 * E && torch::stable::get_num_threads() > 1; }

template <class F> void experts(int64_t E, int64_t R, const F& f) {
  if (side_by_side(E, R)) torch::stable::parallel_for(0, E, 1, f);
  else f(0, E);
}

void gemm_rows(const Tensor& x, const Tensor& w, const Tensor& offsets, const std::optional<Tensor>& slots, int64_t topk, bool dgrad,
               Tensor& y) {
  const int64_t E = w.size(0), N = w.size(1), K = w.size(2), R = y.size(0), wide = y.size(1);
  const int32_t* at = checked(offsets, E, R);
  dispatch(x, "grouped_gemm", [&]<class T>(T) {
    using P = product_t<T>;
    const Side<T> a = side<T>(x, slots, topk);
    const T* wp = in<T>(w);
    T* yp = out<T>(y);
    experts(E, R, [&](int64_t begin, int64_t end) {
      Scratch<P> taken(x), weight(x), made(x);
      for (int64_t e = begin; e < end; e++) {
        const int64_t first = at[e], n = at[e + 1] - first, all = padded<P>(n);
        if (!n || !wide) continue;
        // what a product writes behind its own rows belongs to later experts, who write it later, or to the tail
        const bool straight = std::is_same_v<P, T> && (n == all || (!side_by_side(E, R) && first + all <= R));
        T* to = yp + first * wide;
        const T* we = wp + e * N * K;
        if (ours<P, T>(n, a.width, dgrad)) {
          if constexpr (std::is_same_v<P, float>)
            tiles::multiply<T>(a.view(first, n), dgrad ? tiles::View{we, N, K, K, 1} : tiles::View{we, K, N, 1, K}, to, wide);
          continue;
        }
        const P* b;
        if constexpr (std::is_same_v<P, T>) b = we;
        else convert(we, weight.get(N * K), N * K), b = weight.get(0);
        P* c = straight ? reinterpret_cast<P*>(to) : made.get(all * wide);
        product<P>({c, all, wide}, a.template rows_of<P>(first, n, all, false, taken),
                   dgrad ? Matrix<const P>{b, N, K} : Matrix<const P>{b, K, N, true}, false);
        if (!straight) convert(c, to, n * wide);
      }
    });
    std::memset(yp + at[E] * wide, 0, (R - at[E]) * wide * sizeof(T));
  });
}

Tensor grouped_gemm(Tensor x, Tensor w, Tensor offsets, std::optional<Tensor> slots, std::optional<Tensor> row_of_slot, bool dgrad,
                    std::optional<Tensor>) {
  Tensor y = torch::stable::new_empty(x, {slots ? slots->size(0) : x.size(0), w.size(dgrad ? 2 : 1)});
  gemm_rows(x, w, offsets, slots, slots ? row_of_slot->size(1) : 1, dgrad, y);
  return y;
}

// D: type of dw. Sums are made in D where it is wider than T, so that nothing is rounded on the way to the main gradients.
template <class T, class D>
void wgrad(const Side<T>& g, const Side<T>& x, const int32_t* at, int64_t E, int64_t R, const Tensor& like, D* dw, bool add) {
  using P = std::conditional_t<std::is_same_v<D, T>, product_t<T>, D>;
  const int64_t N = g.width, K = x.width;
  experts(E, R, [&](int64_t begin, int64_t end) {
    Scratch<P> left(like), right(like), made(like);
    for (int64_t e = begin; e < end; e++) {
      D* to = dw + e * N * K;
      if (at[e] == at[e + 1]) {
        if (!add) std::memset(to, 0, N * K * sizeof(D));
        continue;
      }
      const int64_t n = at[e + 1] - at[e], all = padded<P>(n);
      if (ours<P, T>(n, n)) {
        if constexpr (std::is_same_v<P, float>) tiles::multiply<T>(g.view(at[e], n).flipped(), x.view(at[e], n), to, K, add);
        continue;
      }
      P* c;
      if constexpr (std::is_same_v<P, D>) c = to;
      else c = made.get(N * K);
      const Matrix<const P> gm = g.template rows_of<P>(at[e], n, all, true, left), xm = x.template rows_of<P>(at[e], n, all, true, right);
      product<P>({c, N, K}, {gm.data, gm.cols, gm.rows, true}, xm, add);
      if constexpr (!std::is_same_v<P, D>) convert(c, to, N * K);
    }
  });
}

void grouped_wgrad_into(const Tensor& g, const Tensor& x, const Tensor& offsets, const std::optional<Tensor>& g_slots,
                        const std::optional<Tensor>& x_slots, int64_t topk, Tensor& dw, bool add) {
  const int64_t E = dw.size(0), R = g_slots ? g_slots->size(0) : g.size(0);
  const int32_t* at = checked(offsets, E, R);
  dispatch(x, "grouped_gemm", [&]<class T>(T) {
    const Side<T> a = side<T>(g, g_slots, topk), b = side<T>(x, x_slots, topk);
    if (dw.scalar_type() == kType<T>) wgrad<T, T>(a, b, at, E, R, x, out<T>(dw), add);
    else if constexpr (!std::is_same_v<T, acc_t<T>>) wgrad<T, float>(a, b, at, E, R, x, out<float>(dw), add);
  });
}

Tensor grouped_wgrad(Tensor g, Tensor x, Tensor offsets, std::optional<Tensor> g_slots, std::optional<Tensor> x_slots, int64_t topk) {
  Tensor dw = torch::stable::new_empty(x, {offsets.size(0) - 1, g.size(1), x.size(1)});
  grouped_wgrad_into(g, x, offsets, g_slots, x_slots, topk, dw, false);
  return dw;
}

void grouped_wgrad_add(Tensor g, Tensor x, Tensor offsets, std::optional<Tensor> g_slots, std::optional<Tensor> x_slots, int64_t topk,
                       Tensor dw) {
  grouped_wgrad_into(g, x, offsets, g_slots, x_slots, topk, dw, true);
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("grouped_wgrad", TORCH_BOX(&grouped_wgrad));
  m.impl("grouped_wgrad_add", TORCH_BOX(&grouped_wgrad_add));
}
}  // namespace
}  // namespace interlace
