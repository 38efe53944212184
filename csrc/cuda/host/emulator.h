// The parts of CUDA that the sources use, for the host. The threads of a block, or of a cluster of
// blocks, are fibers that one thread of the host runs in turn, each up to its next barrier.
// ThreadSanitizer sees them as threads that only barriers order, so it finds a missing one whatever
// the order. It sees the blocks of a grid, or the clusters, in two series that nothing orders but
// __threadfence(), so it finds memory that one shares with the next. Shared memory is static or
// allocated to its size, so AddressSanitizer finds accesses outside.
// A barrier that not every thread reaches ends the launch with an error.
#pragma once

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "../../common/warp.h"

#define __global__
#define __device__
#define __host__
#if defined(__SANITIZE_THREAD__)
#define __shared__ static thread_local  // see run()
#else
#define __shared__ static
#endif
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
// A function whose accesses ThreadSanitizer does not see; those that it calls are seen.
#define MGHF_UNWATCHED __attribute__((no_sanitize("thread")))

namespace mghf::host {

struct Index {
  unsigned x = 0;
};

constexpr size_t kMostExchanged = 64;  // bytes a thread

// The running thread, and the sizes of its launch.
extern Index thread_index, block_index, grid_size, block_size;

// Properties of the GPU, which tests may set.
struct Gpu {
  int64_t shared_bytes = 227 << 10;
  bool clusters = true;
  int64_t multiprocessors = 132;  // each runs one block at a time
};
extern Gpu gpu;

// A launch that was counted: the kernel, what it was given, and its grid.
struct Counted {
  const void* kernel;
  std::string parameters;
  unsigned blocks = 0, blocks_of_cluster = 1;
  int threads = 0;
  size_t shared_bytes = 0;
};

// While it is on, launches and workspaces are counted, and nothing is run or allocated, so that an
// op's use of a GPU is known without data.
struct Counting {
  bool on = false;
  int64_t launches = 0, workspace_bytes = 0;
  std::vector<Counted> kernels = {};
};
extern Counting counting;

// A kernel's parameters as they lie in its constant memory: each at a multiple of its alignment.
template <class... Parameters>
std::string parameters(const Parameters&... each) {
  std::string bytes;
  const auto append = [&](const auto& parameter) {
    const size_t alignment = alignof(std::remove_cvref_t<decltype(parameter)>);
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
    bytes.append(reinterpret_cast<const char*>(&parameter), sizeof parameter);
  };
  (append(each), ...);
  return bytes;
}

// Runs the kernel for every thread of every block; returns an error text, or null.
const char* run(unsigned blocks, unsigned blocks_of_cluster, int threads, size_t shared_bytes,
                const std::function<void()>& kernel);

void* dynamic_shared();
void* dynamic_shared_of(unsigned block_of_cluster, const void* own);
unsigned cluster_rank();

void sync_block();
void sync_warp();
void sync_cluster();
void fence();

// Returns what every thread of the warp passed, 32 blocks of kMostExchanged bytes, valid until the
// exchange after the next. All threads of the warp must call it. As on a GPU it does not order
// memory.
const unsigned char* exchange(const void* own, size_t bytes);

// Asynchronous copies. They are made when they are waited for, the latest time possible; zeros
// follow the bytes that are present.
struct Copy {
  void* to;
  const void* from;
  int bytes, present;
};
void copy_later(const Copy&);
void end_group_of_copies();
std::vector<Copy> take_copies(int groups_left);

inline void make(const Copy& copy) {
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.present));
  std::memset(static_cast<char*>(copy.to) + copy.present, 0,
              static_cast<size_t>(copy.bytes - copy.present));
}

inline void wait_for_copies(int groups_left) {
  for (const Copy& copy : take_copies(groups_left)) make(copy);
}

// Counters of arrivals and of copied bytes; see ../bulk.h. The copies of a round are made when it
// is first waited for, or else when the next one begins.
void begin_counter(const void* counter, int arrivals);
void note_arrival(const void* counter, int bytes);
void copy_in_round(const void* counter, const Copy& copy);
// Those of a round in which everything has arrived; then the caller makes them and says so.
std::vector<Copy> copies_of_round(const void* counter);
void end_copies_of_round(const void* counter);
// Whether the round of that parity is over; waits for something to happen if not.
bool round_is_over(const void* counter, int parity);

inline void make_copies_of_round(const void* counter) {
  const std::vector<Copy> copies = copies_of_round(counter);
  for (const Copy& copy : copies) make(copy);
  if (!copies.empty()) end_copies_of_round(counter);
}
inline void arrive(const void* counter, int bytes) {
  make_copies_of_round(counter);
  note_arrival(counter, bytes);
}
inline void wait_for_round(const void* counter, int parity) {
  do make_copies_of_round(counter);
  while (!round_is_over(counter, parity));
}

// Products that a warpgroup makes while its threads go on. They are made when they are waited for;
// a factor or sum that has changed by then fails the launch, as does a product that
// begin_products() did not precede.
struct Product {
  virtual ~Product() = default;
  virtual void remember() = 0;  // the sums as they are now
  virtual bool unchanged() const = 0;
  virtual void make() const = 0;
};
void begin_products();
void multiply_later(std::unique_ptr<Product> product);
void end_group_of_products();
void wait_for_products(int groups_left);

template <class T>
T exchanged(const T& own, unsigned lane) {
  static_assert(sizeof(T) <= kMostExchanged);
  T result;
  std::memcpy(&result, exchange(&own, sizeof own) + lane % kWarp * kMostExchanged, sizeof result);
  return result;
}

// The number of the warp that comes before all others.
template <class T, class Before>
T extreme(const T& own, const Before& before) {
  const unsigned char* const all = exchange(&own, sizeof own);
  T found = own;
  for (int lane = 0; lane < kWarp; ++lane) {
    T other;
    std::memcpy(&other, all + lane * kMostExchanged, sizeof other);
    if (before(other, found)) found = other;
  }
  return found;
}

}  // namespace mghf::host

#define threadIdx (::mghf::host::thread_index)
#define blockIdx (::mghf::host::block_index)
#define gridDim (::mghf::host::grid_size)
#define blockDim (::mghf::host::block_size)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline void __syncthreads() { mghf::host::sync_block(); }
inline void __threadfence() { mghf::host::fence(); }
inline void __syncwarp() { mghf::host::sync_warp(); }

// Every thread of the warp must call it.
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return mghf::host::exchanged(value, static_cast<unsigned>(lane));
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return mghf::host::exchanged(value, threadIdx.x ^ static_cast<unsigned>(mask));
}
// The least and the largest number of the warp. Likewise.
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return mghf::host::extreme(value, [](unsigned x, unsigned y) { return x < y; });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return mghf::host::extreme(value, [](unsigned x, unsigned y) { return x > y; });
}

inline int atomicAdd(int* target, int value) {
  return std::atomic_ref<int>(*target).fetch_add(value, std::memory_order_relaxed);
}
