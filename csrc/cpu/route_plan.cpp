// route_plan on CPU: a stable counting sort of (token, choice) slots by expert. Formulae and shapes: kernels/route_plan.py
#include <cmath>
#include <optional>
#include <vector>

#include "common.h"

namespace interlace {
namespace {
using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Shape { int64_t N, E, R, align, capacity; bool full; };

// drop[i] = 1 where an expert has `capacity` larger probs, or equal ones in earlier slots; a NaN is the largest.
template <class I> std::vector<uint8_t> drop_by_probs(const I* ids, const Tensor& probs, const Shape& s) {
  std::vector<double> p(s.N);
  dispatch(probs, "route_plan", [&]<class T>(T) {
    for (int64_t i = 0; i < s.N; i++) p[i] = up(in<T>(probs)[i]);
  });
  std::vector<std::vector<int32_t>> slots(s.E);
  for (int64_t i = 0; i < s.N; i++)
    if (static_cast<uint64_t>(ids[i]) < static_cast<uint64_t>(s.E)) slots[ids[i]].push_back(static_cast<int32_t>(i));
  const auto before = [&](int32_t a, int32_t b) {
    const bool nan_a = std::isnan(p[a]), nan_b = std::isnan(p[b]);
    if (nan_a != nan_b) return nan_a;
    return nan_a || p[a] == p[b] ? a < b : p[a] > p[b];
  };
  std::vector<uint8_t> drop(s.N, 0);
  for (auto& mine : slots) {
    if (static_cast<int64_t>(mine.size()) <= s.capacity) continue;
    std::nth_element(mine.begin(), mine.begin() + s.capacity, mine.end(), before);
    for (auto it = mine.begin() + s.capacity; it != mine.end(); ++it) drop[*it] = 1;
  }
  return drop;
}

// hist[e] += slots of expert e; returns how many ids are out of range. Bin E is for slots without an expert.
template <class I> int64_t count(const I* ids, int64_t begin, int64_t end, int64_t E, int32_t* hist) {
  int64_t invalid = 0;
  for (int64_t i = begin; i < end; i++) {
    const I e = ids[i];
    const bool ok = static_cast<uint64_t>(e) < static_cast<uint64_t>(E);
    invalid += !ok & (e != I(-1));
    hist[ok ? e : E]++;
  }
  return invalid;
}

template <class I> void build(const I* ids, const std::optional<Tensor>& probs, const Shape& s, int32_t* counts, int32_t* routed,
                              int32_t* offsets, int32_t* row_of, int32_t* slot_of, int32_t* invalid) {
  const int64_t P = std::clamp<int64_t>(s.N / 32768, 1, torch::stable::get_num_threads()), W = s.E + 1;
  std::vector<int32_t> hist(P * W, 0), limit(W, 0);
  std::vector<int64_t> wrong(P, 0);
  std::vector<I> kept;
  torch::stable::parallel_for(0, P, 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; p++) wrong[p] = count(ids, s.N * p / P, s.N * (p + 1) / P, s.E, hist.data() + p * W);
  });
  for (int64_t e = 0; e < s.E; e++) {
    routed[e] = 0;
    for (int64_t p = 0; p < P; p++) routed[e] += hist[p * W + e];
  }
  int64_t bad = 0;
  for (int64_t p = 0; p < P; p++) bad += wrong[p];
  *invalid = static_cast<int32_t>(bad);
  if (probs) {
    const std::vector<uint8_t> drop = drop_by_probs(ids, *probs, s);
    kept.resize(s.N);
    for (int64_t i = 0; i < s.N; i++) kept[i] = drop[i] ? I(-1) : ids[i];
    ids = kept.data();
    std::fill(hist.begin(), hist.end(), 0);
    for (int64_t p = 0; p < P; p++) count(ids, s.N * p / P, s.N * (p + 1) / P, s.E, hist.data() + p * W);
  }
  int64_t at = 0;
  for (int64_t e = 0; e < s.E; e++) {  // hist becomes each chunk's first row of each expert
    offsets[e] = static_cast<int32_t>(at);
    const int64_t most = s.capacity < 0 ? s.N : std::min(s.capacity, s.N);
    int64_t n = 0;
    for (int64_t p = 0; p < P; p++) {
      const int32_t mine = hist[p * W + e];
      hist[p * W + e] = static_cast<int32_t>(std::min(at + n, s.R));  // past the limit anyway when clamped
      n += mine;
    }
    n = std::min(n, most);
    counts[e] = static_cast<int32_t>(n);
    limit[e] = static_cast<int32_t>(at + n);
    const int64_t size = ((s.full ? s.capacity : n) + s.align - 1) / s.align * s.align;
    std::fill(slot_of + at + n, slot_of + at + size, -1);
    at += size;
  }
  offsets[s.E] = static_cast<int32_t>(at);
  std::fill(slot_of + at, slot_of + s.R, -1);
  torch::stable::parallel_for(0, P, 1, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; p++) {
      int32_t* next = hist.data() + p * W;
      for (int64_t i = s.N * p / P; i < s.N * (p + 1) / P; i++) {
        const I e = ids[i];
        const int64_t bin = static_cast<uint64_t>(e) < static_cast<uint64_t>(s.E) ? static_cast<int64_t>(e) : s.E;
        const int32_t row = next[bin];
        if (row < limit[bin]) {
          next[bin] = row + 1;  // never past the limit: cannot overflow
          row_of[i] = row;
          slot_of[row] = static_cast<int32_t>(i);
        } else {
          row_of[i] = -1;
        }
      }
    }
  });
}

Plan route_plan(Tensor ids, std::optional<Tensor> probs, int64_t E, int64_t align, int64_t capacity, bool full) {
  const int64_t N = ids.numel(), T = ids.size(0), K = ids.size(1), segment = (capacity + align - 1) / align * align;
  int64_t R = N + std::min(E, N) * (align - 1);
  if (full) R = E * segment;
  else if (capacity >= 0) R = std::min(R, E * segment);
  const Shape shape{N, E, R, align, capacity, full};
  const auto fresh = [&](std::initializer_list<int64_t> size) { return torch::stable::new_empty(ids, size, ScalarType::Int); };
  Plan plan{fresh({E}), fresh({E}), fresh({E + 1}), fresh({T, K}), fresh({R}), fresh({1})};
  auto& [counts, routed, offsets, row_of, slot_of, invalid] = plan;
  const auto run = [&]<class I>(I) {
    build(in<I>(ids), probs, shape, out<int32_t>(counts), out<int32_t>(routed), out<int32_t>(offsets), out<int32_t>(row_of),
          out<int32_t>(slot_of), out<int32_t>(invalid));
  };
  if (ids.scalar_type() == ScalarType::Long) run(int64_t{});
  else if (ids.scalar_type() == ScalarType::Int) run(int32_t{});
  else STD_TORCH_CHECK(false, "route_plan: ids must be int32 or int64");
  return plan;
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) { m.impl("route_plan", TORCH_BOX(&route_plan)); }
}  // namespace
}  // namespace interlace
