// The part of CUDA that the sources use, for the host: the threads of a block are threads, blocks run
// one after the other. Barriers are real, so a missing one is a data race that ThreadSanitizer finds;
// shared memory is static or allocated to its size, so AddressSanitizer finds what lies outside.
#pragma once

#include <atomic>
#include <barrier>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace mghf::host {

struct Index {
  unsigned x = 0;
};

constexpr int kWarp = 32;

// What the threads of the running block share.
struct Block {
  Block(int threads, size_t shared_bytes);

  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<uint64_t> exchanged;  // by shuffles, a word a thread
  std::unique_ptr<unsigned char[]> shared;
};

inline thread_local Index thread_index, block_index, grid_size, block_size;
inline thread_local Block* block = nullptr;

inline void* dynamic_shared() { return block->shared.get(); }

// Runs the kernel for every thread of every block.
void run(unsigned blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace mghf::host

#define threadIdx (::mghf::host::thread_index)
#define blockIdx (::mghf::host::block_index)
#define gridDim (::mghf::host::grid_size)
#define blockDim (::mghf::host::block_size)

struct float2 {
  float x, y;
};

inline void __syncthreads() { mghf::host::block->all.arrive_and_wait(); }
inline void __syncwarp() {
  mghf::host::block->warps[threadIdx.x / mghf::host::kWarp]->arrive_and_wait();
}

// Every thread of the warp has to take part.
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  auto& words = mghf::host::block->exchanged;
  std::memcpy(&words[threadIdx.x], &value, sizeof value);
  __syncwarp();
  T result;
  std::memcpy(&result, &words[threadIdx.x ^ static_cast<unsigned>(mask)], sizeof result);
  __syncwarp();
  return result;
}

inline int atomicAdd(int* target, int value) {
  return std::atomic_ref<int>(*target).fetch_add(value, std::memory_order_relaxed);
}
