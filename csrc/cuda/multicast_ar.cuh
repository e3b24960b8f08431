// The kernel of multicast_ar: all-reduce over a pad (kernels/comm/pad.py) that has a multicast address. Math and protocol:
// kernels/comm/multicast_ar.py; what waits for what: `one_shot` and `multicast` of kernels/comm/protocol.py.
#pragma once
#include "device.cuh"

namespace interlace {
constexpr int CHUNK = 1 << 14;  // bytes of an item: two loads of 16 bytes a thread
constexpr int THREADS = 512;
constexpr int VECTOR = 16;

struct Call {
  const char* x;             // [bytes], 16-byte aligned, as is y, which may be x
  char* y;
  const int64_t* peers;      // of every rank: the address of its allocation
  int* local;                // epoch, programs done, error lock
  int* error;                // set, op, epoch, source, word, got
  char* multicast;           // the address that stands for all the allocations
  int64_t data, nbytes;      // where buffer 0 begins, and the bytes of a buffer
  int64_t bytes;             // of x
  int rank, world, limit, flags, op;
};

// ---- index functions: those of protocol.py, which a test compares ----------------------------------------------

__host__ __device__ inline int64_t buffer_at(const Call& c, int epoch) { return c.data + (epoch & 1) * c.nbytes; }
__host__ __device__ inline int flag_word(int stage, int source, int item, int world, int flags) {
  return (stage * world + source) * flags + item;
}
__host__ __device__ inline int peer_of(int rank, int i, int world) { return (rank + i) % world; }
__host__ __device__ inline int owner_of(int item, int world) { return item % world; }
__host__ __device__ inline int64_t part_slot(int source, int item, int items) { return static_cast<int64_t>(source) * items + item; }

// ---- signals ---------------------------------------------------------------------------------------------------

struct Program {
  const Call& c;
  int epoch;
  bool go;  // whether this rank may send: not after a wait of it has run out, until Pad.reset()

  __device__ explicit Program(const Call& call) : c(call), epoch(static_cast<int>(static_cast<unsigned>(load_word(call.local)) + 1u)) {
    go = __syncthreads_and(load_word(c.local + 2) == 0);
  }

  __device__ int* flag(int rank, int word) const { return reinterpret_cast<int*>(c.peers[rank]) + word; }
  __device__ int behind(int got) const { return static_cast<int>(static_cast<unsigned>(got) - static_cast<unsigned>(epoch)); }

  // What the block's threads wrote before is seen by who waits for this. To `count` ranks from `to` on.
  __device__ void signal(int to, int count, int word) const {
#if INTERLACE_BARRIER
    __syncthreads();
#endif
    const int i = static_cast<int>(threadIdx.x);
    if (go && i < count) store_flag(flag(peer_of(to, i, c.world), word), epoch);
  }

  // True when ranks `first` to `first + count - 1` have signalled this epoch or a later one; bounded. Asks again whether to go on.
  __device__ bool wait(int first, int count, int stage, int item) {
    const int i = static_cast<int>(threadIdx.x);
    const bool mine = i >= count || poll(first + i, flag_word(stage, first + i, item, c.world, c.flags));
    if (i < count) alias_fence();  // on the way of every part: from its sender's release to the loads of this block
    const bool ok = __syncthreads_and(mine);
    go = __syncthreads_and(load_word(c.local + 2) == 0);
    return ok;
  }

  __device__ bool poll(int source, int word) const {
    const int* at = flag(c.rank, word);
    int got = load_flag(at);
    for (int64_t polls = 0; behind(got) < 0 && polls < c.limit; polls++) {
      got = load_flag(at);
      polls += load_word(c.local + 2) ? c.limit : 0;  // after one wait has failed, the others do not spin it out
    }
    if (behind(got) >= 0) return true;
    if (take_word(c.local + 2)) {
      c.error[1] = c.op, c.error[2] = epoch, c.error[3] = source, c.error[4] = word, c.error[5] = got;
      store_flag(c.error, 1);
    }
    return false;
  }

  // Every program of the call ends with this; the last one bumps the epoch, in memory: a CUDA graph replays it.
  __device__ void finish() const {
    __syncthreads();
    if (threadIdx.x == 0 && add_word(c.local + 1, 1) == static_cast<int>(gridDim.x) - 1) c.local[1] = 0, c.local[0] = epoch;
  }
};

// ---- data ------------------------------------------------------------------------------------------------------

template <class T> __device__ uint4 not_a_number() {
  uint4 v;
  T* t = reinterpret_cast<T*>(&v);
  for (unsigned i = 0; i < VECTOR / sizeof(T); i++) t[i] = down<T>(NAN);
  return v;
}

__device__ inline int64_t first_of(int item) { return static_cast<int64_t>(item) * CHUNK; }

// f(offset) for the vectors of an item that hold anything of x; offset in bytes, from the item's start.
template <class F> __device__ void each(const Call& c, int item, const F& f) {
  const int64_t left = c.bytes - first_of(item);
  for (int at = static_cast<int>(threadIdx.x) * VECTOR; at < CHUNK && at < left; at += static_cast<int>(blockDim.x) * VECTOR) f(at);
}

template <class T> __device__ uint4 load(const Call& c, int64_t at) {
  if (at + VECTOR <= c.bytes) return *reinterpret_cast<const uint4*>(c.x + at);
  uint4 v = {};
  for (int i = 0; i < VECTOR; i += sizeof(T))
    if (at + i < c.bytes) reinterpret_cast<T*>(&v)[i / sizeof(T)] = *reinterpret_cast<const T*>(c.x + at + i);
  return v;
}

template <class T> __device__ void store(const Call& c, int64_t at, uint4 v) {
  if (at + VECTOR <= c.bytes) {
    *reinterpret_cast<uint4*>(c.y + at) = v;
    return;
  }
  for (int i = 0; i < VECTOR; i += sizeof(T))
    if (at + i < c.bytes) *reinterpret_cast<T*>(c.y + at + i) = reinterpret_cast<const T*>(&v)[i / sizeof(T)];
}

// ---- kernel ----------------------------------------------------------------------------------------------------

// An item's part goes to all ranks in one store; each sums the parts in rank order.
template <class T> __device__ void send_to_all(const Program& p, int item, int items) {
  const Call& c = p.c;
  const int64_t cell = buffer_at(c, p.epoch) + part_slot(c.rank, item, items) * CHUNK;
  if (p.go) each(c, item, [&](int at) { multimem_store(c.multicast + cell + at, load<T>(c, first_of(item) + at)); });
  p.signal(c.rank, c.world, flag_word(0, c.rank, item, c.world, c.flags));
}

template <class T> __device__ void sum_parts(Program& p, int item, int items) {
  const Call& c = p.c;
  const bool ok = p.wait(0, c.world, 0, item);
  const char* parts = reinterpret_cast<const char*>(c.peers[c.rank]) + buffer_at(c, p.epoch);
  each(c, item, [&](int at) {
    float acc[VECTOR / sizeof(T)] = {};
    for (int s = 0; ok && s < c.world; s++) {
      const uint4 v = load_cell(parts + part_slot(s, item, items) * CHUNK + at);
      for (unsigned i = 0; i < VECTOR / sizeof(T); i++) acc[i] += up(reinterpret_cast<const T*>(&v)[i]);
    }
    uint4 sum = not_a_number<T>();
    for (unsigned i = 0; ok && i < VECTOR / sizeof(T); i++) reinterpret_cast<T*>(&sum)[i] = down<T>(acc[i]);
    store<T>(c, first_of(item) + at, sum);
  });
}

// An item's part stays here; its owner lets the switch sum the parts of all, and sends the sum to all in one store.
template <class T> __device__ void keep(const Program& p, int item) {
  const Call& c = p.c;
  char* cell = reinterpret_cast<char*>(c.peers[c.rank]) + buffer_at(c, p.epoch) + first_of(item);
  if (p.go) each(c, item, [&](int at) { store_cell(cell + at, load<T>(c, first_of(item) + at)); });
  p.signal(owner_of(item, c.world), 1, flag_word(0, c.rank, item, c.world, c.flags));
}

template <class T> __device__ void sum_in_switch(Program& p, int item, int items) {
  const Call& c = p.c;
  const bool ok = p.wait(0, c.world, 0, item);
  char* part = c.multicast + buffer_at(c, p.epoch) + first_of(item);
  if (ok && p.go) each(c, item, [&](int at) { multimem_store(part + first_of(items) + at, multimem_sum<T>(part + at)); });
  p.signal(c.rank, c.world, flag_word(1, c.rank, item, c.world, c.flags));
}

template <class T> __device__ void take(Program& p, int item, int items) {
  const Call& c = p.c;
  const bool ok = p.wait(owner_of(item, c.world), 1, 1, item);
  const char* sum = reinterpret_cast<const char*>(c.peers[c.rank]) + buffer_at(c, p.epoch) + first_of(items) + first_of(item);
  each(c, item, [&](int at) {
    store<T>(c, first_of(item) + at, ok ? load_cell(sum + at) : not_a_number<T>());
  });
}

// A program sends an item, and while that travels sums the one before, and takes in the one before that.
template <class T, bool TWO_SHOT> __global__ void __launch_bounds__(THREADS, 1) multicast_ar_kernel(const Call c) {
  Program p(c);
  const int items = static_cast<int>((c.bytes + CHUNK - 1) / CHUNK), programs = static_cast<int>(gridDim.x);
  for (int item = static_cast<int>(blockIdx.x); item < items + (TWO_SHOT ? 2 : 1) * programs; item += programs) {
    const int before = item - programs, last = item - 2 * programs;
    if constexpr (TWO_SHOT) {
      if (item < items) keep<T>(p, item);
      if (before >= 0 && before < items && owner_of(before, c.world) == c.rank) sum_in_switch<T>(p, before, items);
      if (last >= 0 && last < items) take<T>(p, last, items);
    } else {
      if (item < items) send_to_all<T>(p, item, items);
      if (before >= 0 && before < items) sum_parts<T>(p, before, items);
    }
  }
  p.finish();
}
}  // namespace interlace
