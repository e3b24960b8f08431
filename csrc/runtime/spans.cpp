// Spans of collectives and of the waits in them, kept while a profile is on. One list for all heaps and threads of the process.
#include "heap.h"

#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>

namespace interlace {
namespace {
constexpr size_t MOST = 1 << 20;  // 72 MB; what comes after is counted, not kept
std::atomic<bool> on{false};
std::mutex door;
std::vector<Span> kept;
int64_t lost = 0;

int64_t clock_ns() {
  timespec t;
  clock_gettime(CLOCK_REALTIME, &t);  // torch's profiler shows this clock; one for all ranks of a host
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}
}  // namespace

Recorded::Recorded(const Heap& h, uint32_t op, int peer, int64_t bytes)
    : h(h), bytes(bytes), begin(on.load(std::memory_order_relaxed) ? clock_ns() : 0), op(int32_t(op)), peer(peer) {}

void Recorded::keep() const {
  Span s{begin, clock_ns(), bytes, op, peer, int32_t(syscall(SYS_gettid)), ""};
  snprintf(s.group, sizeof s.group, "%s", h.name.c_str());
  const std::lock_guard<std::mutex> hold(door);
  if (kept.size() < MOST) kept.push_back(s);
  else lost++;
}
}  // namespace interlace

using namespace interlace;

// Start anew (on) or stop; what was recorded stays until the next start.
INTERLACE_API void interlace_record(int start) {
  const std::lock_guard<std::mutex> hold(door);
  if (start) kept.clear(), kept.reserve(1 << 14), lost = 0;
  on.store(start);
}

// Copies up to `room` spans. Returns how many there are, and those that found no room in `lost_`.
INTERLACE_API int64_t interlace_spans(Span* out, int64_t room, int64_t* lost_) {
  const std::lock_guard<std::mutex> hold(door);
  std::copy_n(kept.begin(), std::min<int64_t>(room, int64_t(kept.size())), out);
  *lost_ = lost;
  return int64_t(kept.size());
}
