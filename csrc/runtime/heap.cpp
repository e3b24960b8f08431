// The segment: made, mapped, waited on. The protocol is in heap.h; kernels/comm/heap.py is the only caller.
#include "heap.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif

namespace interlace {
int give_up(Heap& h, int code, const char* why) {
  h.broken = why;
  h.line[h.rank].state.store(BROKEN);  // the others need not wait for a rank that will not come
  return code;
}

namespace {

constexpr int64_t PAGE = 4096;
constexpr double SLICE = 0.05;  // seconds of sleep between two looks at the peers and the clock

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t header(int world) { return (int64_t(sizeof(Line)) * world + PAGE - 1) / PAGE * PAGE; }
int64_t total(int world, int64_t slot) { return header(world) + 2 * slot * world; }

bool reached(uint32_t seen, uint32_t t) { return int32_t(seen - t) >= 0; }

// A zombie counts as dead: a launcher may be slow to reap it. pidfd tells for any process; without it (kernel < 5.3) /proc does.
bool dead(const Peer& p) {
  if (p.pidfd >= 0) {
    pollfd f{p.pidfd, POLLIN, 0};
    return ::poll(&f, 1, 0) == 1;
  }
  if (kill(p.pid, 0) && errno == ESRCH) return true;
  char path[64], text[512] = "";
  snprintf(path, sizeof path, "/proc/%d/stat", p.pid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  const char* at = n > 0 ? strrchr(text, ')') : nullptr;
  return at && at[1] && (at[2] == 'Z' || at[2] == 'X');
}

std::string who(const Heap& h, int r) {
  return "rank " + std::to_string(r) + " (global rank " + std::to_string(h.peers[r].global_rank) + ", pid " +
         std::to_string(h.peers[r].pid) + ") of group '" + h.name + "'";
}

// Sleep until rank q signals t, looking at its health and the clock every SLICE.
int wait_long(Heap& h, int q, uint32_t t, uint32_t op) {
  Line& line = h.line[q];
  const double start = now();
  for (;;) {
    const double left = h.timeout - (now() - start);
    line.sleepers.fetch_add(1);  // before the look at epoch: signal() stores epoch, then reads sleepers
    const uint32_t seen = line.epoch.load();
    if (!reached(seen, t) && left > 0) {
      const double nap = std::min(SLICE, left);
      timespec ts{0, long(nap * 1e9)};
      syscall(SYS_futex, &line.epoch, FUTEX_WAIT, seen, &ts, nullptr, 0);
    }
    line.sleepers.fetch_sub(1);
    const bool gone = dead(h.peers[q]);  // before the last look: it may have signalled, then ended
    const uint32_t state = line.state.load();
    const uint32_t got = line.epoch.load();
    if (reached(got, t)) return OK;
    if (gone || state != OPEN) {
      h.fail(DIED, "%s: %s %s; waited for epoch %u, it had signalled %u", op_name(op), who(h, q).c_str(),
             gone ? "died" : state == CLOSED ? "closed the heap" : "gave up after an error of its own", t, got);
      return give_up(h, DIED, "a rank was lost");
    }
    if (h.poll && syscall(SYS_gettid) == getpid() && h.poll()) {  // Python runs signal handlers in the main thread only
      h.fail(INTERRUPTED, "%s: interrupted while waiting for %s", op_name(op), who(h, q).c_str());
      return give_up(h, INTERRUPTED, "an interrupted wait");
    }
    if (now() - start >= h.timeout) {
      h.fail(TIMEOUT, "%s: no signal from %s in %g s: it is alive but has not made this call; waited for epoch %u, it had "
             "signalled %u. Do all ranks make the same collectives in the same order?", op_name(op), who(h, q).c_str(),
             h.timeout, t, got);
      return give_up(h, TIMEOUT, "a wait that ran out");
    }
  }
}

}  // namespace

const char* op_name(uint32_t op) {
  static const char* names[] = {"barrier", "all_reduce", "all_gather", "reduce_scatter", "all_to_all",
                                "dispatch", "combine", "gemm_ar", "gemm_rs", "ag_gemm", "rs_residual_norm"};
  return op <= RS_RESIDUAL_NORM ? names[op] : "?";
}

std::string describe(const Desc& d) {
  static const char* types[] = {"float64", "float32", "bfloat16", "float16", "int64", "int32"};
  std::string s = std::string(op_name(d.op)) + "(";
  if (d.op == ALL_REDUCE) s += d.red ? "max, " : "sum, ";
  if (d.op >= GEMM_AR) s += std::to_string(d.rows) + " rows of " + std::to_string(d.cols) + ", ";
  if (d.op >= GEMM_AR && d.op <= AG_GEMM) s += "K " + std::to_string(d.inner) + ", ";
  s += std::to_string(d.numel) + (d.dtype < 6 ? std::string(" x ") + types[d.dtype]
                                              : " elements of " + std::to_string(d.dtype - 6) + " bytes");
  if (d.op == DISPATCH || d.op == COMBINE) s += " a row, " + std::to_string(d.red) + " tokens at most";
  return s + (d.staged == IN_BLOCKS ? ", in blocks)" : d.staged ? ", staged)" : ")");
}

// A step that lets others go on is noted before it is done, one that waits for others after it: in the order of time a row then never
// precedes what allowed it.
void Heap::note(Step step, uint32_t t, int r) const {
  if (!trace || trace[0] == room) return;
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  const int64_t row[] = {now.tv_sec * 1000000000 + now.tv_nsec, step, t, r, t & uint32_t((step == DESCRIBE || step == COMPARE ? 2 : buffers) - 1)};
  memcpy(trace + 1 + 5 * trace[0]++, row, sizeof row);
}

char* begin(Heap& h, uint32_t t, int64_t span) {
  h.note(WRITE, t, h.rank);
  if (h.poison)  // NaN in every float type: an early or a late reader sees it
    memset(h.data + (h.rank * 2 + (t & uint32_t(h.buffers - 1))) * h.slot, 0xff, size_t(h.slot));
  return h.place(h.rank, t, span);
}

void signal(Heap& h, uint32_t t) {
  Line& mine = h.line[h.rank];
  h.note(SIGNAL, t, h.rank);
  mine.epoch.store(t);  // sequentially consistent: ordered before the look at sleepers, and a release of the data
  if (mine.sleepers.load()) syscall(SYS_futex, &mine.epoch, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

int wait_all(Heap& h, uint32_t t, uint32_t op) {
  for (int i = 1; i < h.world; i++) {
    const int q = (h.rank + i) % h.world;
    const std::atomic<uint32_t>& epoch = h.line[q].epoch;
    if (!reached(epoch.load(std::memory_order_acquire), t)) {
      const Recorded wait(h, op, h.peers[q].global_rank, 0);
      for (int tries = 0; !reached(epoch.load(std::memory_order_acquire), t); tries++) {
        if (tries < h.spin) pause();
        else if (tries < h.spin + h.yields) sched_yield();
        else if (const int rc = wait_long(h, q, t, op)) return rc;
      }
    }
    h.note(WAIT, t, q);
  }
  if (h.delay_us) usleep(useconds_t(h.delay_us));
  return OK;
}

void first_signal(Heap& h, uint32_t t, const Desc& mine) {
  h.note(DESCRIBE, t, h.rank);
  h.line[h.rank].desc[t & 1] = mine;
  signal(h, t);
}

int first_wait(Heap& h, uint32_t t, const Desc& mine) {
  if (const int rc = wait_all(h, t, mine.op)) return rc;
  for (int q = 0; q < h.world; q++) {
    if (q != h.rank) h.note(COMPARE, t, q);
    const Desc& other = h.line[q].desc[t & 1];
    if (other == mine) continue;
    return h.fail(MISMATCH, "%s: rank %d of group '%s' called %s, but %s called %s, in epoch %u; every rank must make the same call",
                  op_name(mine.op), h.rank, h.name.c_str(), describe(mine).c_str(), who(h, q).c_str(),
                  describe(other).c_str(), t);
  }
  return OK;
}

int first_tick(Heap& h, uint32_t t, const Desc& mine) {
  first_signal(h, t, mine);
  return first_wait(h, t, mine);
}
}  // namespace interlace

using namespace interlace;

namespace {
int refuse(char* err, int len, int code, const char* what, const char* where) {
  snprintf(err, size_t(len), "%s %s: %s", what, where, strerror(errno));
  return code;
}
}  // namespace

INTERLACE_API int64_t interlace_heap_bytes(int world, int64_t slot) { return total(world, slot); }

// Rank 0. O_TMPFILE: an inode that never has a name, so nothing can stay behind whenever a process is killed.
// `named`, where the file system or /proc does not allow that: a name nobody can guess, unlinked once all ranks have it.
INTERLACE_API int interlace_heap_create(const char* folder, const char* named, int64_t bytes, int* fd, char* err, int len) {
  *fd = *named ? open(named, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600)
               : open(folder, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (*fd < 0) return refuse(err, len, SYSTEM, "cannot create shared memory in", folder);
  int why = ftruncate(*fd, bytes) ? errno : 0;
  // Reserved now: a page missing later would be a SIGBUS in the middle of a sum.
  if (!why) do why = posix_fallocate(*fd, 0, bytes); while (why == EINTR);
  if (!why) return OK;
  struct statvfs fs;
  const bool known = !fstatvfs(*fd, &fs);
  close(*fd);
  if (*named) unlink(named);
  *fd = -1;
  if (why != ENOSPC && why != EFBIG) return errno = why, refuse(err, len, SYSTEM, "cannot reserve shared memory in", folder);
  snprintf(err, size_t(len), "%s is too small for the heap: it needs %lld bytes, %lld are free; give it more (docker run "
           "--shm-size=1g, or mount -o remount,size=1g %s) or make a smaller heap (nbytes=)", folder,
           static_cast<long long>(bytes), known ? static_cast<long long>(fs.f_bfree * fs.f_frsize) : -1LL, folder);
  return NO_SPACE;
}

// Every rank, rank 0 too (path /proc/self/fd/N). Pages are touched here, not in the first collective.
INTERLACE_API int interlace_heap_map(const char* path, int rank, int world, int64_t slot, const char* name, const int* pids,
                                     const int* global_ranks, double timeout, int local_ranks, int buffers, Heap** out,
                                     char* err, int len) {
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return refuse(err, len, SYSTEM, "cannot open", path);
  const int64_t bytes = total(world, slot);
  void* base = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  const int why = errno;
  close(fd);
  if (base == MAP_FAILED) return errno = why, refuse(err, len, SYSTEM, "cannot map", path);
  auto* h = new Heap;
  h->rank = rank, h->world = world, h->slot = slot, h->buffers = buffers, h->timeout = timeout, h->name = name;
  h->base = static_cast<char*>(base), h->mapped = bytes;
  h->line = static_cast<Line*>(base), h->data = h->base + header(world);
  for (int r = 0; r < world; r++) {
    const int pidfd = r == rank ? -1 : int(syscall(SYS_pidfd_open, pids[r], 0));
    h->peers.push_back({pids[r], global_ranks[r], pidfd});
  }
  cpu_set_t cores;
  const bool roomy = !sched_getaffinity(0, sizeof cores, &cores) && CPU_COUNT(&cores) >= local_ranks;
  h->spin = roomy ? 2000 : 0;
  h->yields = 100;
  // Measured on 2 Zen 4 cores (1 MB of L2 each, fp32 all-reduce of 64 KB / 1 MB / 4 MB, in us). spread 0: 9.6 / 55 / 305,
  // 0.5 MB: 5.6 / 48 / 237, 1 MB: 3.9 / 47 / 247, 2 MB: 3.8 / 46 / 322. chunk 128 KB: 59 / 288 (1 MB / 4 MB), 256: 52 / 276,
  // 512: 48 / 247, 1024: 53 / 290; interleaved in one run, two ranks as processes: 512 89 / 301, 1024 84 / 271. two-shot and one-shot: 0.5 and 0.3 at 4 KB, 12.5 and 15 at 256 KB, 48 and 58 at 1 MB.
  // Streaming stores: all_gather of 1 MB 79 for 76, of 4 MB 375 for 714, of 16 MB 3600 for 8200.
  const long l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
  h->spread = std::min<int64_t>(l2 > 0 ? l2 : 1 << 20, slot);
  h->chunk = std::min<int64_t>(1 << 20, slot);
  h->two_shot = 256 << 10;
  h->stream = 4 << 20;
  *out = h;
  return OK;
}

// Tell the others that no signal will come from here. The memory stays until interlace_heap_free: views of it may live on.
INTERLACE_API void interlace_heap_close(Heap* h) {
  h->line[h->rank].state.store(CLOSED);
  signal(*h, h->epoch());  // wakes sleepers, moves nothing
  h->broken = "close()";
}

INTERLACE_API void interlace_heap_free(Heap* h) {
  for (const Peer& p : h->peers)
    if (p.pidfd >= 0) close(p.pidfd);
  munmap(h->base, size_t(h->mapped));
  delete h;
}

INTERLACE_API const char* interlace_heap_error(Heap* h) { return h->err; }
INTERLACE_API void* interlace_heap_data(Heap* h) { return h->data; }
INTERLACE_API void* interlace_heap_next(Heap* h, int64_t bytes) { return begin(*h, h->epoch() + 1, bytes); }
INTERLACE_API void interlace_heap_on_wait(Heap* h, int (*poll)()) { h->poll = poll; }
INTERLACE_API void interlace_heap_test(Heap* h, int poison, int delay_us) { h->poison = poison, h->delay_us = delay_us; }
INTERLACE_API void interlace_heap_trace(Heap* h, int64_t* rows, int64_t room) { h->room = room, h->trace = rows; }
INTERLACE_API void interlace_heap_tune(Heap* h, int spin, int yields, int64_t chunk, int64_t two_shot) {
  if (spin >= 0) h->spin = spin;
  if (yields >= 0) h->yields = yields;
  if (chunk > 0) h->chunk = std::min(chunk, h->slot) / 64 * 64;
  if (two_shot >= 0) h->two_shot = two_shot;
}
