// What every collective over the heap is made of: the guard around a call, its chunks and ticks, the copy into my place.
#pragma once
#include "heap.h"

#include <time.h>

#include <algorithm>

namespace interlace {

constexpr int64_t SIZES[] = {8, 4, 2, 2, 8, 4};

// One collective: refused while another thread is inside, and after an error that left the ranks out of step.
struct Call {
  const Recorded span;
  Heap& h;
  int rc = OK;
  bool staged = false;  // src is my buffer of the coming tick
  uint32_t op;
  Call(Heap* heap, uint32_t plain, const void* src, const void* dst, int64_t bytes)
      : span(*heap, heap->as ? heap->as : plain, -1, bytes), h(*heap), op(h.as ? h.as : plain) {
    if (h.busy.test_and_set(std::memory_order_acquire)) {
      rc = BUSY;
      return;
    }
    staged = bytes <= h.slot && src == h.place(h.rank, h.epoch() + 1, bytes);
    if (h.broken)
      rc = h.fail(UNUSABLE, "%s: the heap of group '%s' is out of use after %s; reset_pads() of the group on all ranks, or make a new one",
                  op_name(op), h.name.c_str(), h.broken);
    else if (!staged && h.owns(src))
      rc = h.fail(UNUSABLE, "%s: x lies in the heap but is not all of what stage() last returned; stage it again", op_name(op));
    else if (h.owns(dst))  // written after my signal, while others read it
      rc = h.fail(UNUSABLE, "%s: out lies in the heap, where others read; give it memory of its own", op_name(op));
  }
  Desc desc(int dtype, int red, int64_t n) {
    Desc d{op, uint32_t(dtype), uint32_t(red), staged, n};
    if (h.as) d.rows = h.rows, d.cols = h.cols, d.inner = h.inner;
    return d;
  }
  ~Call() {
    if (rc == BUSY) return;
    h.as = 0;
    h.busy.clear(std::memory_order_release);
  }
};

inline int64_t chunks(int64_t n, int64_t c) { return std::max<int64_t>(1, (n + c - 1) / c); }
inline int64_t length(int64_t n, int64_t c, int64_t k) { return std::max<int64_t>(0, std::min(c, n - k * c)); }

// How a result of `bytes` is written.
inline auto copier(const Heap& h, int64_t bytes) { return bytes >= h.stream ? kernels().stream : kernels().copy; }

// Whether to write my place past the caches. Neither way is always right: a line that another core's cache still holds is
// written at 42 GB/s where the two cores share an L3 and at 10 where they do not (Zen 4, a VM that is moved between the two
// within seconds: 1 MB all-reduced in 50 or 450 us); streaming stores run at 28 GB/s in both (87 us). So every copy from 16 KB
// on is timed, the dearer way is tried again at every 32nd, and a plain store must not cost 1.3 times a streaming one. A choice
// of this rank alone: it changes no bit of the result.
inline bool streams(const Heap& h) { return h.cost[0] > 1.3f * h.cost[1]; }

// Into my own place, to be read by others.
inline void fill(Heap& h, char* place, const char* src, int64_t bytes) {
  if (bytes < 16384) return kernels().copy(place, src, bytes);
  const bool stream = streams(h) != (++h.copies % 32 == 0);
  timespec a, b;
  clock_gettime(CLOCK_MONOTONIC, &a);
  (stream ? kernels().stream : kernels().copy)(place, src, bytes);
  clock_gettime(CLOCK_MONOTONIC, &b);
  const float cost = float((b.tv_sec - a.tv_sec) * 1000000000 + b.tv_nsec - a.tv_nsec) / float(bytes);
  // A preempted copy says nothing: the cost may at most double from one sample to the next.
  float& known = h.cost[stream];
  known = known > 0 ? std::min(cost, 2 * known) : cost;
}

inline int tick(Heap& h, uint32_t t, int64_t k, const Desc& d) {
  if (k == 0) return first_tick(h, t, d);
  signal(h, t);
  return wait_all(h, t, d.op);
}
}  // namespace interlace
