// gemm: c = a b in fp32, for operands of fp32, bf16 or fp16 whose rows may be gathered. Why it is there: kernels/comm/gemm.py
//
// A register tile of R rows by NR columns runs over k: R broadcasts from a, NR / V vectors from b. b lies packed in panels of NR
// columns, [K / KC][N / NR][KC][NR], of which a few stay in L2; of a, blocks of rows do, packed LD apart where it is not read in place.
// Where a has few rows and stays in L2, the roles are swapped: packing b would cost as much as the product (to 256 rows at K = 256).
// A sum is cut every LINK terms: a chain of K additions in fp32 errs more than torch does. No result depends on M, N or threads.
#pragma once
#include <cstring>
#include <memory>
#include <type_traits>

#include "common.h"

namespace interlace::tiles {
#if defined(__AVX512F__)
constexpr int V = 16, MR = 8;
#else
constexpr int V = 8, MR = 6;
#endif
constexpr int64_t NR = 2 * V, KC = 512, LINK = 128, PANELS = 8, ROWS = 12 * MR;
constexpr int64_t LD = KC + 16;  // between packed rows: 2 KB apart they would meet in few sets of L1
using Vec [[gnu::vector_size(4 * V)]] = float;
using Oct [[gnu::vector_size(32)]] = float;
using Ints [[gnu::vector_size(32)]] = int;

alignas(64) inline const float ZEROS[KC] = {};

struct View {  // a matrix of any strides; row, col: which row or column of the data each is, null: itself, below 0: zeros
  const void* data;
  int64_t rows, cols, down, right;
  const int32_t *row = nullptr, *col = nullptr;
  View flipped() const { return {data, cols, rows, right, down, col, row}; }
  // From there on KC elements of a row without `col` may be read, or of a column without `row`.
  template <class T> const T* at(int64_t i, int64_t j) const {
    const int64_t r = row ? row[i] : i, s = col ? col[j] : j;
    return r < 0 || s < 0 ? reinterpret_cast<const T*>(ZEROS) : static_cast<const T*>(data) + r * down + s * right;
  }
};

template <class T> inline Oct eight(const T* p) {
  Oct v;
  if constexpr (std::is_same_v<T, float>) std::memcpy(&v, p, 32);
  else for (int i = 0; i < 8; i++) v[i] = up(p[i]);
  return v;
}

inline void transpose(Oct* r) {
  Oct t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shuffle(r[i], r[i + 1], Ints{0, 8, 1, 9, 4, 12, 5, 13});
    t[i + 1] = __builtin_shuffle(r[i], r[i + 1], Ints{2, 10, 3, 11, 6, 14, 7, 15});
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = __builtin_shuffle(t[i], t[i + 2], Ints{0, 1, 8, 9, 4, 5, 12, 13});
    r[i + 1] = __builtin_shuffle(t[i], t[i + 2], Ints{2, 3, 10, 11, 6, 7, 14, 15});
    r[i + 2] = __builtin_shuffle(t[i + 1], t[i + 3], Ints{0, 1, 8, 9, 4, 5, 12, 13});
    r[i + 3] = __builtin_shuffle(t[i + 1], t[i + 3], Ints{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int i = 0; i < 4; i++) {
    const Oct low = __builtin_shuffle(r[i], r[i + 4], Ints{0, 1, 2, 3, 8, 9, 10, 11});
    r[i + 4] = __builtin_shuffle(r[i], r[i + 4], Ints{4, 5, 6, 7, 12, 13, 14, 15});
    r[i] = low;
  }
}

// to[i * step + j] = m[i0 + i, j0 + j] for rows x cols of it, in fp32.
template <class T> void pack(float* to, int64_t step, const View& m, int64_t i0, int64_t j0, int64_t rows, int64_t cols) {
  if (m.right == 1 && !m.col) {
    for (int64_t i = 0; i < rows; i++) {
      const T* from = m.at<T>(i0 + i, j0);
#pragma omp simd
      for (int64_t j = 0; j < cols; j++) to[i * step + j] = up(from[j]);
    }
    return;
  }
  int64_t whole = 0;  // rows done below: 16 at a time, a whole line of fp32; 64 of them stay in L1 until their lines are full
  if (m.down == 1 && !m.row)
    for (int64_t first = (whole = rows / 16 * 16, 0), end; first < whole; first = end)
      for (int64_t j = (end = std::min(whole, first + 64), 0); j + 8 <= cols; j += 8) {
        const T* from[8];
        for (int k = 0; k < 8; k++) from[k] = m.at<T>(i0, j0 + j + k);
        for (int64_t i = first; i < end; i += 8) {
          Oct r[8];
          for (int k = 0; k < 8; k++) r[k] = eight(from[k] + i);
          transpose(r);
          for (int k = 0; k < 8; k++) std::memcpy(to + (i + k) * step + j, &r[k], 32);
        }
      }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = i < whole ? cols / 8 * 8 : 0; j < cols; j++) to[i * step + j] = up(*m.at<T>(i0 + i, j0 + j));
}

// c[R, NR] (+)= a[R, n] b[n, NR]; a: where each row is
template <int R> void tile(int64_t n, const float* const* a, const float* __restrict b, float* c, int64_t step, bool add) {
  const float* row[R];
  for (int i = 0; i < R; i++) row[i] = a[i];
  int64_t k = 0;
  do {
    Vec s[R][2] = {};
    for (const int64_t end = std::min(n, k + LINK); k < end; k++) {
      const Vec left = *reinterpret_cast<const Vec*>(b + k * NR), right = *reinterpret_cast<const Vec*>(b + k * NR + V);
#pragma GCC unroll 16
      for (int i = 0; i < R; i++) {
        s[i][0] += row[i][k] * left;
        s[i][1] += row[i][k] * right;
      }
    }
    for (int i = 0; i < R; i++)
      for (int j = 0; j < 2; j++) {
        Vec had = {};
        if (add) std::memcpy(&had, c + i * step + j * V, sizeof had);
        had += s[i][j];
        std::memcpy(c + i * step + j * V, &had, sizeof had);
      }
    add = true;
  } while (k < n);
}
using Tile = void (*)(int64_t, const float* const*, const float*, float*, int64_t, bool);
inline const Tile TILES[] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>, tile<8>};

// Memory on lines, kept for the thread.
template <int WHICH> float* room(int64_t n) {
  struct Free { void operator()(float* p) const { std::free(p); } };
  static thread_local std::unique_ptr<float, Free> held;
  static thread_local int64_t size = 0;
  if (n > size) held.reset(static_cast<float*>(std::aligned_alloc(64, (4 * n + 63) / 64 * 64))), size = n;
  return held.get();
}

// Where rows i0 .. of a block are, from column k on, `depth` of them in fp32: where they lie, or packed to `to`, LD apart. Rows too far
// apart would meet in few sets of L2.
template <class T> void rows_at(const float** row, float* to, const View& m, int64_t i0, int64_t k, int64_t rows, int64_t depth) {
  const bool there = std::is_same_v<T, float> && m.right == 1 && !m.col && m.down <= 2048;
  if (!there) pack<T>(to, LD, m, i0, k, rows, depth);
  for (int64_t i = 0; i < rows; i++) row[i] = there ? m.at<float>(i0 + i, k) : to + i * LD;
}

template <class D> void store(D* to, const float* from, int64_t n, bool add) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) to[i] = down<D>(add ? up(to[i]) + from[i] : from[i]);
}

inline int64_t panels(int64_t n) { return (n + NR - 1) / NR; }

// Columns first .. first + n of b, in panels; the last one is filled up with zeros.
template <class T> void pack_panels(float* to, const View& b, int64_t first, int64_t n) {
  const int64_t P = panels(n);
  torch::stable::parallel_for(0, P, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      for (int64_t k = 0; k < b.rows; k += KC) {
        const int64_t depth = std::min(KC, b.rows - k), wide = std::min(NR, n - p * NR);
        float* at = to + k * P * NR + p * depth * NR;
        if (wide < NR) std::memset(at, 0, static_cast<size_t>(4 * depth * NR));
        pack<T>(at, NR, b, k, first + p * NR, depth, wide);
      }
  });
}

// c = a b, or c += a b, for columns `first` .. `first` + n of c, whose panels are given. A task is a block of rows times a range of panels.
template <class T, class D>
void by_panels(const View& a, const float* packed, D* c, int64_t step, int64_t first, int64_t n, bool add = false) {
  const int64_t M = a.rows, K = a.cols, P = panels(n), blocks = (M + ROWS - 1) / ROWS, threads = torch::stable::get_num_threads();
  const int64_t cuts = std::min<int64_t>((P + PANELS - 1) / PANELS, (threads + blocks - 1) / blocks), each = (P + cuts - 1) / cuts;
  torch::stable::parallel_for(0, blocks * cuts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t m0 = task / cuts * ROWS, m = std::min(ROWS, M - m0), p0 = task % cuts * each, p1 = std::min(P, p0 + each);
      if (p0 >= p1) continue;
      const int64_t wide = (p1 - p0) * NR, left = std::min(wide, n - p0 * NR);
      D* to = c + m0 * step + first + p0 * NR;
      const bool straight = std::is_same_v<D, float> && left == wide;  // sums in place
      float *rows = room<0>(ROWS * LD), *sums = straight ? reinterpret_cast<float*>(to) : room<1>(ROWS * wide);
      const int64_t down = straight ? step : wide;
      const float* row[ROWS];
      for (int64_t k = 0; k < K; k += KC) {
        const int64_t depth = std::min(KC, K - k);
        rows_at<T>(row, rows, a, m0, k, m, depth);
        for (int64_t q = p0; q < p1; q += PANELS)
          for (int64_t i = 0; i < m; i += MR)
            for (int64_t p = q; p < std::min(p1, q + PANELS); p++)
              TILES[std::min<int64_t>(MR, m - i)](depth, row + i, packed + k * P * NR + p * depth * NR,
                    sums + i * down + (p - p0) * NR, down, k > 0 || (straight && add));
      }
      for (int64_t i = 0; i < m && !straight; i++) store(to + i * step, sums + i * wide, left, add);
    }
  });
}

// c = a b with panels of rows of a, and tiles of columns of b: the tile is the product's transpose.
template <class T, class D> void swapped(const View& a, const View& b, D* c, int64_t step, bool add) {
  const int64_t M = a.rows, K = a.cols, N = b.cols, P = panels(M);
  const View at = a.flipped(), bt = b.flipped();
  const std::unique_ptr<float, decltype(&std::free)> packed(
      static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(4 * K * P * NR))), &std::free);
  pack_panels<T>(packed.get(), at, 0, M);
  torch::stable::parallel_for(0, (N + MR - 1) / MR, std::max<int64_t>(1, (1 << 20) / (K * P * NR)), [&](int64_t begin, int64_t end) {
    float *rows = room<0>(ROWS * LD), *sums = room<1>(P * NR * MR);
    const float* row[MR];
    for (int64_t t = begin; t < end; t++) {
      const int64_t n = std::min<int64_t>(MR, N - t * MR);
      for (int64_t k = 0; k < K; k += KC) {
        const int64_t depth = std::min(KC, K - k);
        rows_at<T>(row, rows, bt, t * MR, k, n, depth);
        for (int64_t p = 0; p < P; p++)
          TILES[n](depth, row, packed.get() + k * P * NR + p * depth * NR, sums + p * NR, P * NR, k > 0);
      }
      if (std::is_same_v<D, float> && !add) {
        pack<float>(reinterpret_cast<float*>(c) + t * MR, step, {sums, M, n, 1, P * NR}, 0, 0, M, n);
        continue;
      }
      for (int64_t m = 0; m < M; m++)
        for (int64_t j = 0; j < n; j++) {
          D& to = c[m * step + t * MR + j];
          to = down<D>(add ? up(to) + sums[j * P * NR + m] : sums[j * P * NR + m]);
        }
    }
  });
}

// Whether this product of T is faster than torch's in float, on the CPU that it runs on.
template <class T> inline bool ahead() {
#if defined(__AVX2__) && defined(__FMA__)
  return !std::is_same_v<T, float> || __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// c = a b, or c += a b; c's rows are `step` apart.
template <class T, class D> void multiply(const View& a, const View& b, D* c, int64_t step, bool add = false) {
  const int64_t K = a.cols, N = b.cols;
  if (b.down == 1 && a.rows <= K && a.rows * K <= (128 << 10)) return swapped<T>(a, b, c, step, add);
  const int64_t most = std::max<int64_t>(4, (1 << 20) / (std::max<int64_t>(K, 1) * NR)) * NR;  // 4 MB of panels at a time
  float* packed = room<2>(K * std::min(most, panels(N) * NR));
  for (int64_t n = 0; n < N; n += most) {
    pack_panels<T>(packed, b, n, std::min(most, N - n));
    by_panels<T>(a, packed, c, step, n, std::min(most, N - n), add);
  }
}
}  // namespace interlace::tiles
