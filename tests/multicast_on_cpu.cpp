// The kernel of csrc/cuda/multicast_ar.cuh between ranks that are threads of this process.
//   run WORLD PROGRAMS TYPE N CALLS EPOCH KIND     every rank CALLS times; KIND 0 one-shot, 1 two-shot, 2 in turns
//   late PROGRAMS KIND                             rank 1 makes its calls when rank 0's waits have run out
//   trace WORLD RANK PROGRAMS N KIND               what rank RANK does when every flag is there already
// Prints one line a fault, then "done"; trace: one line a step.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "multicast_ar.cuh"

using namespace interlace;

struct Ranks {
  int world, programs, items, threads;
  int64_t data, nbytes, n;
  std::vector<std::vector<int64_t>> memory;
  std::vector<std::vector<int>> local, error;
  std::vector<int64_t> peers;
  int limit = 1 << 30;

  Ranks(int world_, int programs_, int64_t n_, size_t size, int epoch)
      : world(world_), programs(programs_), items(static_cast<int>((n_ * size + CHUNK - 1) / CHUNK)), threads(std::max(world_, 3)),
        data((2 * world_ * items * 4 + 255) / 256 * 256), nbytes(static_cast<int64_t>(std::max(world_, 2)) * items * CHUNK), n(n_) {
    allocated = data + 2 * nbytes;
    for (int r = 0; r < world; r++) {
      memory.emplace_back((data + 2 * nbytes) / 8, -1);
      allocations.push_back(reinterpret_cast<char*>(memory.back().data()));
      peers.push_back(reinterpret_cast<int64_t>(memory.back().data()));
      std::fill_n(reinterpret_cast<int*>(memory.back().data()), data / 4, epoch);
      local.push_back({epoch, 0, 0}), error.emplace_back(6);
    }
  }

  Call call(int rank, const void* x, void* y, int64_t bytes) {
    return {static_cast<const char*>(x), static_cast<char*>(y), peers.data(), local[rank].data(), error[rank].data(), MULTICAST, data,
            nbytes, bytes, rank, world, limit, items, 0};
  }

  template <class T> void launch(const Call& c, bool two_shot) {  // returns when the kernel has ended, as a stream would see it
    std::vector<Block*> blocks;
    std::vector<std::thread> all;
    for (int b = 0; b < programs; b++) {
      blocks.push_back(new Block(threads));
      for (int t = 0; t < threads; t++)
        all.emplace_back([=, this] {
          block = blocks[b], phase = 0;
          threadIdx.x = t, blockIdx.x = b, blockDim.x = threads, gridDim.x = programs;
          two_shot ? multicast_ar_kernel<T, true>(c) : multicast_ar_kernel<T, false>(c);
        });
    }
    for (auto& t : all) t.join();
    if (tracing) print(blocks);
  }

  void print(const std::vector<Block*>& blocks) const {  // a block's steps in order: by barriers, then as thread 0 took them
    for (size_t b = 0; b < blocks.size(); b++) {
      std::vector<std::array<int64_t, 5>> seen;
      std::vector<std::array<int, 2>> groups;
      for (const Event& lead : blocks[b]->events[0]) {
        const std::array<int, 2> group{lead.phase, lead.kind};
        if (std::find(groups.begin(), groups.end(), group) != groups.end()) continue;
        groups.push_back(group);
        for (const auto& thread : blocks[b]->events)
          for (const Event& e : thread) {
            const bool flag = e.at < data;
            const std::array<int64_t, 5> step{e.phase, e.kind, e.rank, flag ? 0 : (e.at - data) / nbytes,
                                              flag ? e.at / 4 : (e.at - data) % nbytes / CHUNK};
            if (e.phase == group[0] && e.kind == group[1] && std::find(seen.begin(), seen.end(), step) == seen.end()) seen.push_back(step);
          }
      }
      for (const auto& [phase, kind, rank, buffer, slot] : seen)
        std::printf("%zu %ld %ld %ld %ld\n", b, static_cast<long>(kind), static_cast<long>(rank), static_cast<long>(buffer),
                    static_cast<long>(slot));
    }
  }
};

int value(int64_t i, int rank, int call) { return static_cast<int>((i * 7 + rank * 3 + call * 5) % 7) - 3; }

std::atomic<int> faults{0};

// One call of a rank. Returns how many results are neither right nor NaN.
template <class T> int64_t once(Ranks& ranks, int rank, int call, bool two_shot, bool in_place, int64_t* nans = nullptr) {
  std::vector<T> x(ranks.n), y(ranks.n);
  for (int64_t i = 0; i < ranks.n; i++) x[i] = down<T>(static_cast<float>(value(i, rank, call)));
  T* to = in_place ? x.data() : y.data();
  ranks.launch<T>(ranks.call(rank, x.data(), to, ranks.n * static_cast<int64_t>(sizeof(T))), two_shot);
  // Nobody writes into the buffer of the call that has ended before this rank has signalled the next one.
  std::fill_n(ranks.memory[rank].data() + (ranks.data + (ranks.local[rank][0] & 1) * ranks.nbytes) / 8, ranks.nbytes / 8, -1);
  int64_t wrong = 0;
  for (int64_t i = 0; i < ranks.n; i++) {
    int sum = 0;
    for (int r = 0; r < ranks.world; r++) sum += value(i, r, call);
    if (nans && std::isnan(up(to[i]))) ++*nans;
    else wrong += up(to[i]) != static_cast<float>(sum);
  }
  return wrong;
}

template <class T> void run(int world, int programs, int64_t n, int calls, int epoch, int kind) {
  Ranks ranks(world, programs, n, sizeof(T), epoch);
  dawdle = [] {
    thread_local std::minstd_rand dice(static_cast<unsigned>(std::hash<std::thread::id>()(std::this_thread::get_id())));
    if (dice() % 256 == 0) std::this_thread::sleep_for(std::chrono::microseconds(dice() % 300));
  };
  std::vector<std::thread> hosts;
  for (int r = 0; r < world; r++)
    hosts.emplace_back([&, r] {
      for (int e = 0; e < calls; e++)
        if (const int64_t wrong = once<T>(ranks, r, e, kind == 2 ? e % 2 : kind, e % 3 == 1)) {
          std::printf("rank %d call %d: %ld of %ld are wrong\n", r, e, static_cast<long>(wrong), static_cast<long>(n));
          faults++;
        }
    });
  for (auto& h : hosts) h.join();
  for (int r = 0; r < world; r++)
    if (ranks.local[r] != std::vector<int>{static_cast<int>(static_cast<unsigned>(epoch) + calls), 0, 0} || ranks.error[r][0])
      std::printf("rank %d: epoch %d, %d counted, %d failed\n", r, ranks.local[r][0], ranks.local[r][1], ranks.local[r][2]), faults++;
}

void late(int programs, bool two_shot) {
  const int64_t n = 30000;
  Ranks ranks(2, programs, n, 4, 0);
  ranks.limit = 50;
  int64_t nans = 0, wrong = 0;
  for (int e = 0; e < 3; e++) wrong += once<float>(ranks, 0, e, two_shot, false, &nans);
  const auto& error = ranks.error[0];
  std::printf("rank 0: %ld wrong, %ld of %ld nan, error %d epoch %d source %d got %d\n", static_cast<long>(wrong), static_cast<long>(nans),
              static_cast<long>(3 * n), error[0], error[2], error[3], error[5]);
  wrong = 0;
  for (int e = 0; e < 3; e++) {  // what it takes for right must be right
    nans = 0;
    wrong += once<float>(ranks, 1, e, two_shot, false, &nans);
  }
  std::printf("rank 1: %ld wrong, error %d\n", static_cast<long>(wrong), ranks.error[1][0]);
}

int main(int count, char** words) {
  const auto number = [&](int i) { return std::atoi(words[i]); };
  const std::string what = count > 1 ? words[1] : "";
  if (what == "run" && count == 9) {
    const auto all = [&](auto T) { run<decltype(T)>(number(2), number(3), number(5), number(6), number(7), number(8)); };
    const std::string type = words[4];
    type == "fp32" ? all(float{}) : type == "bf16" ? all(bf16{}) : all(fp16{});
  } else if (what == "late" && count == 4) {
    late(number(2), number(3));
  } else if (what == "trace" && count == 7) {
    Ranks ranks(number(2), number(4), number(5), 4, 1 << 20);
    const int rank = number(3);
    ranks.local[rank][0] = 0;
    tracing = true;
    once<float>(ranks, rank, 0, number(6), false);
  } else {
    return 2;
  }
  if (!faults) std::printf("done\n");
  return faults != 0;
}
