// Collectives over the heap, as rows of ticks (heap.h). Messages over one chunk go through in chunks that stay in L2.
#include "call.h"

namespace interlace {
namespace {

// Every rank reads all of every buffer and sums it all: one tick a chunk.
int one_shot(Heap& h, const char* src, char* dst, int64_t n, int64_t c, int64_t size, Reduce reduce, const Desc& d) {
  std::vector<const void*> from(h.world);
  const int64_t span = std::min(n, c) * size;
  for (int64_t k = 0; k < chunks(n, c); k++) {
    const uint32_t t = h.epoch() + 1;
    const int64_t at = k * c * size, m = length(n, c, k);
    if (!d.staged) fill(h, begin(h, t, span), src + at, m * size);
    if (const int rc = tick(h, t, k, d)) return rc;
    for (int r = 0; r < h.world; r++) from[r] = r == h.rank ? src + at : h.place(r, t, span);
    reduce(dst + at, nullptr, from.data(), h.world, m);
  }
  return OK;
}

// Rank r sums part r of a chunk and the others copy the result: 2(W-1)/W of a chunk read from others instead of W-1.
// Still one tick a chunk: tick t carries the inputs of chunk t, and the sums of chunk t - 1 in the place of my own part,
// which nobody needs as an input.
int two_shot(Heap& h, const char* src, char* dst, int64_t n, int64_t c, int64_t size, Reduce reduce, const Desc& d) {
  std::vector<const void*> from(h.world);
  const int64_t K = chunks(n, c), line = 64 / size, span = std::min(n, c) * size;
  // On cache lines, and the same in the shorter last chunk: its inputs must not fall on the sums of the one before.
  const int64_t p = ((std::min(n, c) + h.world - 1) / h.world + line - 1) / line * line;
  const auto put = copier(h, n * size);
  auto part = [&](int64_t k, int r, int64_t& begin) {  // elements of part r of chunk k
    const int64_t m = length(n, c, k);
    begin = std::min(m, r * p);
    return std::min(m, (r + 1) * p) - begin;
  };
  for (int64_t k = 0; k <= K + 1; k++) {
    const uint32_t t = h.epoch() + 1;
    int64_t at = 0;
    char* mine = k <= K ? (d.staged && k == 0) ? h.place(h.rank, t, span) : begin(h, t, span) : nullptr;
    if (k < K && !d.staged)
      for (int r = 0; r < h.world; r++)
        if (const int64_t m = part(k, r, at); r != h.rank && m) fill(h, mine + at * size, src + (k * c + at) * size, m * size);
    if (k >= 1 && k <= K) {
      const int64_t m = part(k - 1, h.rank, at), whole = (k - 1) * c + at;
      for (int r = 0; r < h.world; r++) from[r] = r == h.rank ? src + whole * size : h.place(r, t - 1, span) + at * size;
      if (m * size >= 16384 && streams(h)) {
        reduce(dst + whole * size, nullptr, from.data(), h.world, m);
        fill(h, mine + at * size, dst + whole * size, m * size);
      } else if (n * size < h.stream) {
        reduce(dst + whole * size, mine + at * size, from.data(), h.world, m);
      } else {
        reduce(mine + at * size, nullptr, from.data(), h.world, m);
        put(dst + whole * size, mine + at * size, m * size);
      }
    }
    if (k >= 2)
      for (int i = 1; i < h.world; i++) {
        const int r = (h.rank + i) % h.world;
        if (const int64_t m = part(k - 2, r, at))
          put(dst + ((k - 2) * c + at) * size, h.place(r, t - 1, span) + at * size, m * size);
      }
    if (k <= K)
      if (const int rc = tick(h, t, k, d)) return rc;
  }
  return OK;
}

int64_t whole_lines(int64_t elements, int64_t size) { return std::max<int64_t>(1, elements / (64 / size)) * (64 / size); }

}  // namespace
}  // namespace interlace

using namespace interlace;

// dst[i] = sum (or max) over ranks of src[i]. dst may be src. src may be the buffer of interlace_heap_next: no copy in.
INTERLACE_API int interlace_all_reduce(Heap* heap, const void* src, void* dst, int64_t n, int dtype, int red) {
  Call call(heap, ALL_REDUCE, src, dst, n * SIZES[dtype]);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const int64_t size = SIZES[dtype];
  const Desc d = call.desc(dtype, red, n);
  const int64_t c = d.staged ? std::max<int64_t>(n, 1) : h.chunk / size;
  const int64_t bytes = n * size;  // between two ranks both move as much; from 4 MB on one-shot's single pass wins: 271 to 444 us
  const auto run = bytes >= h.two_shot && (h.world > 2 || bytes < h.stream) ? two_shot : one_shot;
  return run(h, static_cast<const char*>(src), static_cast<char*>(dst), n, c, size, kernels().reduce[red][dtype], d);
}

// dst[r * n + i] = rank r's src[i]. dtype: a code of the sums, or 6 + bytes of an element.
INTERLACE_API int interlace_all_gather(Heap* heap, const void* src, void* dst, int64_t n, int64_t size, int dtype) {
  Call call(heap, ALL_GATHER, src, dst, n * size);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const Desc d = call.desc(dtype, 0, n);
  const int64_t bytes = n * size, c = d.staged ? std::max<int64_t>(bytes, 1) : h.chunk, span = std::min(bytes, c);
  const auto put = copier(h, bytes * h.world);
  auto from = static_cast<const char*>(src);
  auto to = static_cast<char*>(dst);
  for (int64_t k = 0; k < chunks(bytes, c); k++) {
    const uint32_t t = h.epoch() + 1;
    const int64_t at = k * c, m = length(bytes, c, k);
    if (!d.staged) fill(h, begin(h, t, span), from + at, m);
    if (const int rc = tick(h, t, k, d)) return rc;
    for (int i = 0; i < h.world; i++) {
      const int r = (h.rank + i) % h.world;
      put(to + r * bytes + at, r == h.rank ? from + at : h.place(r, t, span), m);
    }
  }
  return OK;
}

namespace {
// Part r of src goes to rank r, c elements of it at a time; take(at, m, from) gets what the ranks have for me: from[q] = elements
// at..at+m of q's part me.
template <class Take> int scatter(Heap& h, const char* src, int64_t n, int64_t c, int64_t size, const Desc& d, Take take) {
  const int64_t part = std::min(n, c) * size, span = part * h.world;
  std::vector<const void*> from(h.world);
  for (int64_t k = 0; k < chunks(n, c); k++) {
    const uint32_t t = h.epoch() + 1;
    const int64_t at = k * c, m = length(n, c, k);
    if (!d.staged) {
      char* mine = begin(h, t, span);
      for (int r = 0; r < h.world; r++)
        if (r != h.rank) fill(h, mine + r * part, src + (r * n + at) * size, m * size);
    }
    if (const int rc = tick(h, t, k, d)) return rc;
    for (int q = 0; q < h.world; q++)
      from[q] = q == h.rank ? src + (h.rank * n + at) * size : h.place(q, t, span) + h.rank * part;
    take(at, m, from.data());
  }
  return OK;
}

// Elements of a part that go through at a time.
int64_t portion(const Heap& h, int64_t n, int64_t size, const Desc& d) {
  return d.staged ? std::max<int64_t>(n, 1) : whole_lines(h.chunk / size / h.world, size);
}
}  // namespace

// dst[i] = sum over ranks of src[rank * n + i]; n elements per rank.
INTERLACE_API int interlace_reduce_scatter(Heap* heap, const void* src, void* dst, int64_t n, int dtype) {
  Call call(heap, REDUCE_SCATTER, src, dst, n * SIZES[dtype] * heap->world);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const int64_t size = SIZES[dtype];
  const Desc d = call.desc(dtype, 0, n);
  auto to = static_cast<char*>(dst);
  return scatter(h, static_cast<const char*>(src), n, portion(h, n, size, d), size, d, [&](int64_t at, int64_t m, const void* const* from) {
    kernels().reduce[0][dtype](to + at * size, nullptr, from, h.world, m);
  });
}

// dst[q * n + i] = rank q's src[rank * n + i]; n elements per pair of ranks.
INTERLACE_API int interlace_all_to_all(Heap* heap, const void* src, void* dst, int64_t n, int64_t size, int dtype) {
  Call call(heap, ALL_TO_ALL, src, dst, n * size * heap->world);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const bool staged = call.staged;
  const auto put = copier(h, n * size * h.world);
  const Desc d = call.desc(dtype, 0, n);
  auto to = static_cast<char*>(dst);
  return scatter(h, static_cast<const char*>(src), n, portion(h, n, size, d), size, d, [&](int64_t at, int64_t m, const void* const* from) {
    for (int q = 0; q < h.world; q++) put(to + (q * n + at) * size, from[q], m * size);
  });
}

// What a fused op does with rows at..at+m of its part: from[q] = rank q's.
using TakeRows = void (*)(void* self, int64_t at, int64_t m, const void* const* from);

// A reduce-scatter of [world * rows, cols] in whole rows, which `take` sums. A row of every part must fit a slot.
INTERLACE_API int interlace_scatter_rows(Heap* heap, int op, const void* src, int64_t rows, int64_t cols, int dtype, TakeRows take,
                                         void* self) {
  const int64_t row = cols * SIZES[dtype];
  Call call(heap, uint32_t(op), src, nullptr, rows * row * heap->world);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const Desc d{uint32_t(op), uint32_t(dtype), 0, call.staged, rows * cols, rows * h.world, cols, 0};
  const int64_t c = call.staged ? std::max<int64_t>(rows, 1) : std::max<int64_t>(1, h.chunk / std::max<int64_t>(row, 1) / h.world);
  return scatter(h, static_cast<const char*>(src), rows, c, row, d,
                 [&](int64_t at, int64_t m, const void* const* from) { take(self, at, m, from); });
}

INTERLACE_API int interlace_barrier(Heap* heap) {
  Call call(heap, BARRIER, nullptr, nullptr, 0);
  if (call.rc) return call.rc;
  return first_tick(*heap, heap->epoch() + 1, Desc{BARRIER, 1, 0, 0, 0});
}

// ---- fused ops: the caller computes between the steps, in the order heap.h tells ------------------------------------

// The next collective works for fused op `op` over a matrix of rows x cols: it says so in its descriptor and its errors.
INTERLACE_API void interlace_heap_as(Heap* h, int op, int64_t rows, int64_t cols, int64_t inner) {
  h->as = uint32_t(op), h->rows = rows, h->cols = cols, h->inner = inner;
}

// The opening tick: all ranks are about to walk the same matrix, or all are told who is not. The heap is taken until walk_end.
INTERLACE_API int interlace_walk_begin(Heap* heap, int op, int64_t rows, int64_t cols, int64_t inner, int dtype) {
  Call call(heap, uint32_t(op), nullptr, nullptr, 0);
  if (call.rc) return call.rc;
  const Desc d{uint32_t(op), uint32_t(dtype), 0, IN_BLOCKS, rows * cols, rows, cols, inner};
  if (const int rc = first_tick(*heap, heap->epoch() + 1, d)) return rc;
  heap->as = uint32_t(op);
  call.rc = BUSY;  // stays taken
  return OK;
}

namespace {
char* half(const Heap& h, int r, uint32_t t) {
  return h.data + (int64_t(r) * 2 + (t & uint32_t(h.buffers - 1))) * h.slot + (h.buffers > 1 ? int64_t(t >> 1 & 1) * (h.slot / 2) : 0);
}
}  // namespace

// Step 1 of the coming tick: where I write, up to half a slot.
INTERLACE_API void* interlace_walk_place(Heap* h) {
  char* mine = half(*h, h->rank, h->epoch() + 1);
  if (h->poison) memset(mine, 0xff, size_t(h->slot / 2));
  return mine;
}

INTERLACE_API void interlace_walk_signal(Heap* h) { signal(*h, h->epoch() + 1); }             // step 2
INTERLACE_API int interlace_walk_wait(Heap* h) {                                                // step 3
  const Recorded span(*h, h->as, -1, 0);
  return wait_all(*h, h->epoch(), h->as);
}
INTERLACE_API void* interlace_walk_peer(Heap* h, int r) { return half(*h, r, h->epoch()); }    // step 4: where rank r wrote

// Step 4: dst = the sum over ranks of n elements from byte `at` of each place, in rank order.
INTERLACE_API void interlace_walk_sum(Heap* h, void* dst, int64_t at, int64_t n, int dtype) {
  const Recorded span(*h, h->as, -1, n);
  std::vector<const void*> from(h->world);
  for (int r = 0; r < h->world; r++) from[r] = half(*h, r, h->epoch()) + at;
  kernels().reduce[0][dtype](dst, nullptr, from.data(), h->world, n);
}

// `done` is 0 where the walk broke off: the ranks are out of step, and the others are told that no signal will come.
INTERLACE_API void interlace_walk_end(Heap* h, int done) {
  if (!done && !h->broken) give_up(*h, UNUSABLE, "a fused op that broke off");
  h->as = 0;
  h->busy.clear(std::memory_order_release);
}
