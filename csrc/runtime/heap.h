// The CPU symmetric heap: one shared segment per group, two data buffers and one signal line per rank.
//
//   segment   [ Line x world | pad to a page | buffer 0 of rank 0 | buffer 1 of rank 0 | buffer 0 of rank 1 | ... ]
//
// Every collective is a row of ticks. Rank r counts its ticks in line[r].epoch, which only r writes. Tick t of a rank:
//     1. write into its own buffer t & 1                        (the data of tick t)
//     2. signal: line[r].epoch = t                              (release)
//     3. wait until line[q].epoch >= t for every q              (acquire)
//     4. read anybody's buffer t & 1
// Why one wait per tick is enough with two buffers. Rank r writes buffer t & 1 again at tick t + 2, step 1. Before that it
// passed the wait of tick t + 1, so every q had signalled t + 1, which q does only after its own step 4 of tick t: nobody
// still reads what r overwrites. And r reads at step 4 of tick t what q wrote before signalling t; q cannot have gone on to
// overwrite it, since q's tick t + 2 needs r's signal t + 1, which r has not sent. So a rank is never more than one tick
// ahead of a reader, in any order of ops, and no op needs a barrier of its own. With one buffer (`buffers` = 1, tests only)
// the first sentence fails: r may write tick t + 1 while q reads tick t, and test_heap.py shows it does.
//
// A fused op (the walk in collectives.cpp, kernels/comm/walk.py) computes between the steps. It opens with a tick that carries
// the descriptor alone, and then takes them in the order 1 of tick t + 1, 3 and 4 of tick t, 2 of tick t + 1: it writes before it
// waits, so ranks that are less than a block apart never wait. Step 2 still says that step 4 of the tick before is done, as
// above, so any op may follow. But when r writes tick t + 1 it has only passed the wait of t - 1: of each q it knows that
// q is done with tick t - 2. So its last three places must be three: each buffer is halved, and tick t lies in half (t >> 1) & 1
// of buffer t & 1, which makes four. The opening tick keeps those clear of what the op before left to be read.
//
// Epochs are u32 (a futex word) compared by signed difference, so they may wrap: ranks are at most one tick apart. They live
// in the segment, not in a process. With the first signal of a collective goes a descriptor (op, dtype, size) in
// line[r].desc[t & 1]; it is protected by the same argument as the data. All ranks see all descriptors, so all of them refuse
// a mismatch, at the same tick, and the heap stays in step.
#pragma once
#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace interlace {

struct Desc {
  uint32_t op, dtype, red, staged;  // staged: 1, IN_BLOCKS for a walk, whose ticks hold other rows
  int64_t numel;
  int64_t rows = 0, cols = 0, inner = 0;  // of a fused op: of the matrix that is exchanged, all blocks of it; its product's K
  bool operator==(const Desc& o) const {
    return op == o.op && dtype == o.dtype && red == o.red && staged == o.staged && numel == o.numel && rows == o.rows &&
           cols == o.cols && inner == o.inner;
  }
};

// Two cache lines: the adjacent-line prefetcher would otherwise pull a neighbour's signal along.
struct alignas(128) Line {
  std::atomic<uint32_t> epoch;     // last tick this rank has signalled
  std::atomic<uint32_t> sleepers;  // ranks in a futex wait on `epoch`: no wake-up call while it is 0
  std::atomic<uint32_t> state;     // OPEN, CLOSED by its owner, or BROKEN: gave up after an error
  Desc desc[2];
};
static_assert(sizeof(Line) == 128 && std::atomic<uint32_t>::is_always_lock_free);

enum : uint32_t { IN_BLOCKS = 2 };
enum State : uint32_t { OPEN = 0, CLOSED = 1, BROKEN = 2 };
enum Op : uint32_t { BARRIER, ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, ALL_TO_ALL, DISPATCH, COMBINE, GEMM_AR, GEMM_RS, AG_GEMM, RS_RESIDUAL_NORM };
enum Step : int64_t { WRITE, DESCRIBE, SIGNAL, WAIT, COMPARE, READ };  // the table of them: kernels/comm/protocol.py
enum Code { OK = 0, MISMATCH = 1, TIMEOUT = 2, DIED = 3, INTERRUPTED = 4, UNUSABLE = 5, SYSTEM = 6, NO_SPACE = 7, BUSY = 8 };

struct Peer {
  int pid, global_rank, pidfd;
};

struct Heap {
  int rank, world;
  int64_t slot;          // bytes of one buffer
  int64_t spread = 0;    // bytes of a buffer that places go around in
  int buffers = 2;       // 1 only in the negative control
  char* base = nullptr;
  int64_t mapped = 0;
  Line* line = nullptr;  // [world]
  char* data = nullptr;
  double timeout;        // seconds a wait may last
  int spin = 0, yields = 0;
  int64_t chunk = 0, two_shot = 0, stream = 0;  // bytes: of a chunk; of a message from which on: two-shot, streaming stores
  float cost[2] = {0, 0};  // ns a byte, last seen, of copies into my place with plain and with streaming stores
  uint32_t copies = 0;
  std::string name;
  std::vector<Peer> peers;
  int (*poll)() = nullptr;      // asked between slices of a long wait: nonzero to give up (a signal arrived)
  int poison = 0, delay_us = 0; // tests: fill a buffer with NaN before it is written, dawdle before it is read
  int64_t *trace = nullptr, room = 0;  // tests: the number of rows, then rows of (nanoseconds, step, tick, rank, buffer)
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  uint32_t as = 0;              // the fused op that the next collective works for, and its sizes: in the descriptor
  int64_t rows = 0, cols = 0, inner = 0;
  const char* broken = nullptr;
  char err[1024] = "";

  void note(Step step, uint32_t t, int r) const;
  uint32_t epoch() const { return line[rank].epoch.load(std::memory_order_relaxed); }
  // Where rank r keeps the `span` bytes of tick t: in its buffer t & 1, each time in another place. A line that a peer read a
  // moment ago is slow to write again (its L2 must give it up): in one place 64 KB took 9.6 us a call, all around an L2 3.9 us.
  char* place(int r, uint32_t t, int64_t span) const {
    if (trace && r != rank) note(READ, t, r);
    const int64_t step = span > 64 ? (span + 63) / 64 * 64 : 64;
    return data + (int64_t(r) * 2 + (t & uint32_t(buffers - 1))) * slot + (spread > step ? int64_t(t >> 1) % (spread / step) * step : 0);
  }
  bool owns(const void* p) const { return p >= data + rank * 2 * slot && p < data + (rank + 1) * 2 * slot; }
  int fail(int code, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    va_list args;
    va_start(args, format);
    vsnprintf(err, sizeof err, format, args);
    va_end(args);
    return code;
  }
};

int give_up(Heap& h, int code, const char* why);       // out of use from here on: the others need not wait for this rank

// What a profile sees of the heaps (models/profile.py): every collective and every wait in it, as a span on the clock of torch's
// profiler. Off, it costs one load a collective and one a wait that does not end at the first look.
struct Span {
  int64_t begin, end, bytes;  // nanoseconds of CLOCK_REALTIME
  int32_t op, peer, thread;   // peer: global rank that was waited for, -1: the collective itself
  char group[36];
};
struct Recorded {
  const Heap& h;
  const int64_t bytes, begin;
  const int32_t op, peer;
  Recorded(const Heap& h, uint32_t op, int peer, int64_t bytes);
  ~Recorded() { if (begin) keep(); }
  void keep() const;
};

const char* op_name(uint32_t op);
std::string describe(const Desc& d);
char* begin(Heap& h, uint32_t t, int64_t span);        // step 1: my place of tick t, about to be written
void signal(Heap& h, uint32_t t);                      // step 2
int wait_all(Heap& h, uint32_t t, uint32_t op);        // step 3
void first_signal(Heap& h, uint32_t t, const Desc& mine); // steps 2 and 3 with the descriptor: MISMATCH where they differ
int first_wait(Heap& h, uint32_t t, const Desc& mine);
int first_tick(Heap& h, uint32_t t, const Desc& mine); // both

// The sums, built once per instruction set and picked at load time (reduce.h). src: [world] pointers, summed in rank order.
using Reduce = void (*)(void* dst, void* also, const void* const* src, int world, int64_t n);
// Rows summed among themselves before they join the total; of the type, or of the one it is computed in (`wide`: one row).
struct Group {
  const void* const* row;
  int n;
  bool wide;
};
// dst[i] = group 0 + group 1 + ... ; past: around the caches, dst on a line. Fetches the `ahead` rows `next` on the way.
using SumRows = void (*)(void* dst, const Group* group, int groups, int64_t n, const void* const* next, int ahead, bool past);
struct Kernels {
  void (*copy)(void* dst, const void* src, int64_t bytes);
  void (*stream)(void* dst, const void* src, int64_t bytes);
  void (*past)(void* dst, const void* src, int64_t bytes);  // stream() of any length, whose end the caller fences
  SumRows wide[4], total[4];  // [float64, float32, bfloat16, float16]; dst of the computed type, of the type
  Reduce reduce[2][6];  // [sum, max][float64, float32, bfloat16, float16, int64, int32]
};
const Kernels& kernels();
}  // namespace interlace

#define INTERLACE_API extern "C" __attribute__((visibility("default")))
