// Stands in for the device under csrc/cuda/*.cuh: a thread of the host for every thread of a block, allocations of the host for those
// of the GPUs, a loop over them for the switch. Flags are atomics and data is plain, so a race detector sees what the flags do not order.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <sched.h>

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

struct uint4 { unsigned x, y, z, w; };
struct Index { unsigned x; };
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace interlace {
using fp16 = _Float16;
struct bf16 { uint16_t bits; };
inline float up(float x) { return x; }
inline float up(fp16 x) { return static_cast<float>(x); }
inline float up(bf16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
template <class T> T down(float x) { return static_cast<T>(x); }
template <> inline bf16 down<bf16>(float x) { return {static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16)}; }  // of exact values

// ---- a block: its barrier, and what its threads did -------------------------------------------------------------

struct Event { int phase, thread, kind, rank; int64_t at; };  // kind: write 0, signal 1, wait 2, read 3
struct Block {
  const int size;
  std::atomic<int> arrived{0}, turn{0}, failed{0};
  std::vector<std::vector<Event>> events;
  explicit Block(int n) : size(n), events(n) {}
  void meet() {
    const int now = turn.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      arrived.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
    } else {
      while (turn.load(std::memory_order_acquire) == now) sched_yield();
    }
  }
};
inline thread_local Block* block;
inline thread_local int phase;
inline std::vector<char*> allocations;  // of the ranks, each so large:
inline int64_t allocated;
inline char* const MULTICAST = reinterpret_cast<char*>(int64_t{1} << 46);  // no address of this process
inline bool tracing = false;
inline void (*dawdle)() = [] {};

inline void note(int kind, const void* where) {
  for (size_t r = 0; tracing && r < allocations.size(); r++)
    if (const int64_t at = static_cast<const char*>(where) - allocations[r]; at >= 0 && at < allocated)
      block->events[threadIdx.x].push_back({phase, static_cast<int>(threadIdx.x), kind, static_cast<int>(r), at});
}
}  // namespace interlace

inline void __syncthreads() { interlace::block->meet(), interlace::phase++; }
inline int __syncthreads_and(bool mine) {
  interlace::Block& b = *interlace::block;
  if (!mine) b.failed.store(1, std::memory_order_relaxed);
  b.meet();
  const int all = !b.failed.load(std::memory_order_relaxed);
  b.meet();
  b.failed.store(0, std::memory_order_relaxed);
  b.meet();
  interlace::phase++;
  return all;
}

namespace interlace {
#if INTERLACE_ORDERED
constexpr auto ACQUIRE = std::memory_order_acquire, RELEASE = std::memory_order_release;
#else
constexpr auto ACQUIRE = std::memory_order_relaxed, RELEASE = std::memory_order_relaxed;
#endif

inline std::atomic_ref<int> word(const int* at) { return std::atomic_ref<int>(*const_cast<int*>(at)); }
inline int load_flag(const int* at) {
  note(2, at);
  sched_yield();
  return word(at).load(ACQUIRE);
}
inline void store_flag(int* at, int value) {
  note(1, at);
  word(at).store(value, RELEASE);
}
inline int load_word(const int* at) { return word(at).load(std::memory_order_relaxed); }
inline int add_word(int* at, int value) { return word(at).fetch_add(value, std::memory_order_acq_rel); }
inline bool take_word(int* at) {
  int free = 0;
  return word(at).compare_exchange_strong(free, 1, std::memory_order_relaxed);
}
inline void alias_fence() {}

inline uint4 load_cell(const char* at) {
  note(3, at);
  return *reinterpret_cast<const uint4*>(at);
}
inline void store_cell(char* at, uint4 v) {
  dawdle();
  note(0, at);
  *reinterpret_cast<uint4*>(at) = v;
}
inline void multimem_store(char* at, uint4 v) {
  for (size_t i = 0; i < allocations.size(); i++) store_cell(allocations[i] + (at - MULTICAST), v);
}
template <class T> uint4 multimem_sum(const char* at) {
  float sum[16 / sizeof(T)] = {};
  for (char* base : allocations) {
    const uint4 v = load_cell(base + (at - MULTICAST));
    for (unsigned i = 0; i < 16 / sizeof(T); i++) sum[i] += up(reinterpret_cast<const T*>(&v)[i]);
  }
  uint4 v;
  for (unsigned i = 0; i < 16 / sizeof(T); i++) reinterpret_cast<T*>(&v)[i] = down<T>(sum[i]);
  return v;
}
}  // namespace interlace
