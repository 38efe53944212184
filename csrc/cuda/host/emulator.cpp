// Compiled without ThreadSanitizer, because all fibers share this file's data.
#include "emulator.h"

#include <sys/mman.h>

#include <map>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(MGHF_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>

#include <thread>
#endif

#include "context.h"

namespace mghf::host {

Index thread_index, block_index, grid_size, block_size;
Gpu gpu;
Counting counting;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostCopies = 160;  // of a round
constexpr size_t kOutermostBytes = 4 << 10;
#if defined(MGHF_THREAD_SANITIZER)
constexpr unsigned kCrews = 2;
#else
constexpr unsigned kCrews = 1;
#endif

// Two addresses for ThreadSanitizer's state of a barrier, used in turn: what threads release at the
// next wait must not be acquired by those that have yet to leave this one.
struct Barrier {
  unsigned threads = 0, arrived = 0;
  uint64_t times = 0;
  char known[2];

  void arrive(bool orders_memory) {
#if defined(MGHF_THREAD_SANITIZER)
    if (orders_memory) __tsan_release(&known[times % 2]);
#endif
    (void)orders_memory;
    if (++arrived == threads) {
      arrived = 0;
      ++times;
    }
  }
  void leave(uint64_t time) {
#if defined(MGHF_THREAD_SANITIZER)
    __tsan_acquire(&known[time % 2]);
#endif
    (void)time;
  }
};

struct Warp {
  Barrier ordering, exchanging;
  unsigned char words[2][kWarp][kMostExchanged];
};

// A round is complete when all have arrived, and is over once its copies have been made.
struct Counter {
  Barrier rounds;
  unsigned arrivals = 0, arrived = 0;
  int64_t missing_bytes = 0;
  Copy copies[kMostCopies];  // not a vector, whose memory ThreadSanitizer would watch
  size_t number = 0;

  bool complete() const { return arrived == arrivals && missing_bytes == 0; }
  void* known() const { return const_cast<char*>(&rounds.known[rounds.times % 2]); }
};

struct Block {
  Barrier barrier;
  std::map<const void*, Counter> counters;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

// The stack of a fiber. Stacks are reused, because new memory costs more than a short kernel.
struct Stack {
  void* memory = nullptr;
#if defined(MGHF_THREAD_SANITIZER)
  void* known = nullptr;
#endif
};

struct Fiber {
  Context context;
  Stack stack;
  unsigned thread = 0, rank = 0, block = 0;
  const Barrier* waits_for = nullptr;
  const Counter* waits_for_round = nullptr;
  uint64_t time = 0;
  bool done = false;
  std::vector<std::vector<Copy>> copies{1};
  std::vector<std::vector<std::unique_ptr<Product>>> products;  // and the group that has begun
  bool products_begun = false;

  bool can_run() const {
    if (waits_for_round != nullptr) {
      return waits_for_round->complete() || waits_for_round->rounds.times != time;
    }
    return !done && (waits_for == nullptr || waits_for->times != time);
  }
};

// The fibers that run every kCrews-th cluster of a grid.
struct Launch {
  unsigned crew = 0, clusters = 0, blocks_of_cluster = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  Barrier cluster, end;
  const char* error = nullptr;
  std::vector<Fiber> fibers;
  Context scheduler;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
#endif
#if defined(MGHF_THREAD_SANITIZER)
  void* scheduler_known = nullptr;
#endif
};

Launch* launch = nullptr;
Fiber* fiber = nullptr;

void entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &launch->scheduler_stack,
                                  &launch->scheduler_stack_bytes);
#endif
}

void to_scheduler() {
  Fiber* const self = fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(self->done ? nullptr : &fake, launch->scheduler_stack,
                                 launch->scheduler_stack_bytes);
#endif
#if defined(MGHF_THREAD_SANITIZER)
  __tsan_switch_to_fiber(launch->scheduler_known, __tsan_switch_to_fiber_no_sync);
#endif
  self->context.switch_to(launch->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& next) {
  fiber = &next;
  thread_index.x = next.thread;
  block_index.x = next.block;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, next.stack.memory, kStackBytes);
#endif
#if defined(MGHF_THREAD_SANITIZER)
  __tsan_switch_to_fiber(next.stack.known, __tsan_switch_to_fiber_no_sync);
#endif
  launch->scheduler.switch_to(next.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void wait(Barrier& barrier, bool orders_memory) {
  const uint64_t time = barrier.times;
  barrier.arrive(orders_memory);
  if (barrier.times == time) {
    fiber->waits_for = &barrier;
    fiber->time = time;
    to_scheduler();
    fiber->waits_for = nullptr;
  }
  if (orders_memory) barrier.leave(time);
}

// A fiber runs its thread of every cluster of its crew in turn, in the same shared memory.
void live() {
  entered();
  Fiber* const self = fiber;
  wait(launch->end, true);  // makes the caller's writes visible
  for (unsigned cluster = launch->crew; cluster < launch->clusters; cluster += kCrews) {
    self->block = cluster * launch->blocks_of_cluster + self->rank;
    block_index.x = self->block;
    (*launch->kernel)();
    self->copies.assign(1, {});
    if (!self->products.empty()) launch->error = "a thread ends before its products";
    self->products.clear();
    self->products_begun = false;
    wait(launch->end, true);
  }
  self->done = true;
  to_scheduler();
}

// The first `number` stacks of a crew, or none if memory is short.
const std::vector<Stack>& stacks(unsigned crew, size_t number) {
  static std::vector<Stack> of_crews[kCrews];
  std::vector<Stack>& kept = of_crews[crew];
  while (kept.size() < number) {
    void* const memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      static const std::vector<Stack> none;
      return none;
    }
    kept.push_back({memory});
#if defined(MGHF_THREAD_SANITIZER)
    kept.back().known = __tsan_create_fiber(0);
#endif
  }
  return kept;
}

// Removes AddressSanitizer's marks of frames that were never returned from: the outermost, or all
// if threads got stuck.
void forget_frames(const Stack& stack, bool stuck) {
#if defined(__SANITIZE_ADDRESS__)
  const size_t bytes = stuck ? kStackBytes : kOutermostBytes;
  __asan_unpoison_memory_region(static_cast<char*>(stack.memory) + kStackBytes - bytes, bytes);
#endif
  (void)stack;
  (void)stuck;
}

}  // namespace

void* dynamic_shared() { return launch->blocks[fiber->rank].shared.get(); }

void* dynamic_shared_of(unsigned block_of_cluster, const void* own) {
  const auto offset = static_cast<const unsigned char*>(own) -
                      static_cast<const unsigned char*>(dynamic_shared());
  return launch->blocks[block_of_cluster].shared.get() + offset;
}

unsigned cluster_rank() { return fiber->rank; }

void sync_block() { wait(launch->blocks[fiber->rank].barrier, true); }
void sync_warp() {
  wait(launch->blocks[fiber->rank].warps[fiber->thread / kWarp].ordering, true);
}
void sync_cluster() { wait(launch->cluster, true); }

const unsigned char* exchange(const void* own, size_t bytes) {
  Warp& warp = launch->blocks[fiber->rank].warps[fiber->thread / kWarp];
  auto& words = warp.words[warp.exchanging.times % 2];
  unsigned char* const to = words[fiber->thread % kWarp];
  // Not a call of memcpy, which ThreadSanitizer intercepts.
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) __builtin_memcpy(to + i, static_cast<const char*>(own) + i, 8);
  for (; i < bytes; ++i) to[i] = static_cast<const volatile unsigned char*>(own)[i];
  wait(warp.exchanging, false);
  return &words[0][0];
}

void copy_later(const Copy& copy) { fiber->copies.back().push_back(copy); }

void end_group_of_copies() { fiber->copies.emplace_back(); }

std::vector<Copy> take_copies(int groups_left) {
  auto& groups = fiber->copies;
  std::vector<Copy> taken;
  while (groups.size() > static_cast<size_t>(groups_left) + 1) {
    taken.insert(taken.end(), groups.front().begin(), groups.front().end());
    groups.erase(groups.begin());
  }
  return taken;
}

namespace {

Counter& counter_at(const void* place) { return launch->blocks[fiber->rank].counters[place]; }

void release(Counter& counter) {
#if defined(MGHF_THREAD_SANITIZER)
  __tsan_release(counter.known());
#endif
  (void)counter;
}

// Ends the round if everything is in and nothing is to be copied.
void end_round(Counter& counter) {
  if (!counter.complete() || counter.number > 0) return;
  counter.arrived = 0;
  ++counter.rounds.times;
}

}  // namespace

void begin_counter(const void* counter, int arrivals) {
  counter_at(counter) = Counter{};
  counter_at(counter).arrivals = static_cast<unsigned>(arrivals);
}

void note_arrival(const void* place, int bytes) {
  Counter& counter = counter_at(place);
  if (counter.arrived == counter.arrivals) launch->error = "more arrivals than a round has";
  release(counter);
  ++counter.arrived;
  counter.missing_bytes += bytes;
  end_round(counter);
}

void copy_in_round(const void* place, const Copy& copy) {
  Counter& counter = counter_at(place);
  if (counter.number == kMostCopies) {
    launch->error = "more copies than the emulator keeps for a round";
    return;
  }
  release(counter);
  counter.missing_bytes -= copy.bytes;
  counter.copies[counter.number++] = copy;
}

std::vector<Copy> copies_of_round(const void* place) {
  const Counter& counter = counter_at(place);
  std::vector<Copy> copies;
  if (!counter.complete()) return copies;
  for (size_t i = 0; i < counter.number; ++i) copies.push_back(counter.copies[i]);
#if defined(MGHF_THREAD_SANITIZER)
  if (!copies.empty()) __tsan_acquire(counter.known());
#endif
  return copies;
}

void end_copies_of_round(const void* place) {
  Counter& counter = counter_at(place);
  counter.number = 0;
  release(counter);
  end_round(counter);
}

bool round_is_over(const void* place, int parity) {
  Counter& counter = counter_at(place);
  const uint64_t time = counter.rounds.times;
  if (static_cast<int>(time % 2) != parity) {
    counter.rounds.leave(time - 1);
    return true;
  }
  fiber->waits_for_round = &counter;
  fiber->time = time;
  to_scheduler();
  fiber->waits_for_round = nullptr;
  return false;
}

void begin_products() { fiber->products_begun = true; }

void multiply_later(std::unique_ptr<Product> product) {
  if (!fiber->products_begun) launch->error = "a product without begin_products() before it";
  if (fiber->products.empty()) fiber->products.emplace_back();
  fiber->products.back().push_back(std::move(product));
}

void end_group_of_products() { fiber->products.emplace_back(); }

void wait_for_products(int groups_left) {
  auto& groups = fiber->products;
  for (const auto& group : groups) {
    for (const auto& product : group) {
      if (!product->unchanged()) launch->error = "a product's factor or sum changes during it";
    }
  }
  while (groups.size() > static_cast<size_t>(groups_left) + 1) {
    const auto group = std::move(groups.front());
    groups.erase(groups.begin());
    for (const auto& product : group) product->make();
  }
  for (const auto& group : groups) {
    for (const auto& product : group) product->remember();
  }
  if (groups.size() == 1 && groups.front().empty()) groups.clear();
  fiber->products_begun = false;
}

namespace {

void prepare(Launch& own, unsigned crew, unsigned blocks, unsigned blocks_of_cluster, int threads,
             size_t shared_bytes, const std::function<void()>& kernel) {
  own.crew = crew;
  own.clusters = blocks / blocks_of_cluster;
  own.blocks_of_cluster = blocks_of_cluster;
  own.kernel = &kernel;
  own.cluster.threads = own.end.threads = blocks_of_cluster * static_cast<unsigned>(threads);
  own.blocks.resize(blocks_of_cluster);
  for (Block& block : own.blocks) {
    block.barrier.threads = static_cast<unsigned>(threads);
    block.warps.resize(static_cast<size_t>(threads) / kWarp);
    for (Warp& warp : block.warps) warp.ordering.threads = warp.exchanging.threads = kWarp;
    block.shared.reset(new unsigned char[shared_bytes]);
    for (size_t i = 0; i < shared_bytes; ++i) block.shared[i] = 0xff;  // NaN
  }
  own.fibers.resize(own.end.threads);
  for (size_t i = 0; i < own.fibers.size(); ++i) {
    own.fibers[i].thread = static_cast<unsigned>(i) % static_cast<unsigned>(threads);
    own.fibers[i].rank = static_cast<unsigned>(i) / static_cast<unsigned>(threads);
  }
}

void run_crew(Launch& own) {
  launch = &own;
  const std::vector<Stack>& kept = stacks(own.crew, own.fibers.size());
  if (kept.empty()) {
    own.error = "no memory for the threads' stacks";
    return;
  }
#if defined(MGHF_THREAD_SANITIZER)
  own.scheduler_known = __tsan_get_current_fiber();
#endif
  for (size_t i = 0; i < own.fibers.size(); ++i) {
    Fiber& of = own.fibers[i];
    of.stack = kept[i];
    of.context.prepare(of.stack.memory, kStackBytes, live);
  }
#if defined(MGHF_THREAD_SANITIZER)
  __tsan_release(&own.end.known[0]);
#endif
  // Every second pass begins with the last thread, so that results that depend on the order differ.
  size_t ended = 0;
  bool stuck = false;
  for (unsigned pass = 0; ended < own.fibers.size() && !stuck; ++pass) {
    stuck = true;
    for (size_t i = 0; i < own.fibers.size(); ++i) {
      Fiber& next = own.fibers[pass % 2 == 0 ? i : own.fibers.size() - 1 - i];
      if (!next.can_run()) continue;
      stuck = false;
      to_fiber(next);
      ended += next.done ? 1 : 0;
    }
  }
  for (const Fiber& of : own.fibers) forget_frames(of.stack, stuck);
  launch = nullptr;
  fiber = nullptr;
  if (stuck) own.error = "threads wait at a barrier that others never reach";
}

}  // namespace

void fence() {
#if defined(MGHF_THREAD_SANITIZER)
  static char known;
  __tsan_release(&known);
  __tsan_acquire(&known);
#endif
}

// Blocks of a grid are not ordered. Under ThreadSanitizer neither are those of two crews, which run
// one after the other: it reports memory that a cluster shares with the next by mistake. A crew has
// a thread of the host for itself, and with it static shared memory.
const char* run(unsigned blocks, unsigned blocks_of_cluster, int threads, size_t shared_bytes,
                const std::function<void()>& kernel) {
  if (static_cast<int64_t>(shared_bytes) > gpu.shared_bytes) return "too much shared memory";
  if (blocks_of_cluster > 1 && !gpu.clusters) return "there are no clusters";
  if (blocks % blocks_of_cluster != 0) return "the blocks make no whole clusters";
  if (threads % kWarp != 0 || threads > 1024) return "the block has no whole warps, or too many";
  if (counting.on) {
    ++counting.launches;
    return nullptr;
  }
  grid_size.x = blocks;
  block_size.x = static_cast<unsigned>(threads);
  Launch crews[kCrews];
  for (unsigned crew = 0; crew < kCrews && crew < blocks / blocks_of_cluster; ++crew) {
    prepare(crews[crew], crew, blocks, blocks_of_cluster, threads, shared_bytes, kernel);
  }
  run_crew(crews[0]);
#if defined(MGHF_THREAD_SANITIZER)
  if (crews[0].error == nullptr && !crews[1].fibers.empty()) {
    std::thread(run_crew, std::ref(crews[1])).join();
    crews[0].error = crews[1].error;
  }
  // Only now, so that the first crew's work is not passed on to the second.
  for (Launch& crew : crews) {
    for (char& known : crew.end.known) __tsan_acquire(&known);
  }
#endif
  return crews[0].error;
}

}  // namespace mghf::host
