#include "planted.h"

#include "../../csrc/cuda/bulk.h"

namespace mghf::cuda {

namespace {

constexpr int kNumbers = 64;

__global__ void reverse(const int* x, int* result, int fault) {
  __shared__ int shared[kNumbers];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = x[thread];
  if (fault == 0 || (fault == 2 && thread < kNumbers / 2)) __syncthreads();
  result[thread] = shared[kNumbers - 1 - thread];
}

__global__ void copy(const int* x, int* result, int first) {
  MGHF_DYNAMIC_SHARED(int, shared);
  const int thread = static_cast<int>(threadIdx.x);
  shared[first + thread] = x[thread];
  __syncthreads();
  result[thread] = shared[first + thread];
}

__global__ void reverse_in_cluster(const int* x, int* result, int fault) {
  MGHF_DYNAMIC_SHARED(int, shared);
  constexpr int kHalf = kNumbers / 2;
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned rank = block_of_cluster();
  shared[thread] = x[static_cast<int>(rank) * kHalf + thread];
  if (fault == 0) sync_cluster();
  const int value = of_block(shared, 1 - rank)[kHalf - 1 - thread];
  sync_cluster();  // the other block's memory ends with it
  result[static_cast<int>(rank) * kHalf + thread] = value;
}

__global__ void copy_asynchronously(const int* x, int* result, int fault) {
  __shared__ int shared[kNumbers];
  const int thread = static_cast<int>(threadIdx.x);
  copy_async<4>(shared + thread, x + thread);
  end_copies();
  if (fault != 1) wait_for_copies<0>();
  if (fault != 2) __syncthreads();
  result[thread] = shared[kNumbers - 1 - thread];
}

constexpr int kSlots = 2, kOfSlot = 16;

// One warp fills the slots, the other reads them.
__global__ void reverse_through_ring(const int* x, int* result, int fault) {
  struct Shared {
    alignas(16) int slots[kSlots][kOfSlot];
    Counter open[kSlots], free[kSlots];
  };
  MGHF_DYNAMIC_SHARED(Shared, shared);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      shared->open[slot].begin(1);
      shared->free[slot].begin(kOfSlot);
    }
  }
  publish_counters();
  for (int i = 0; i < kNumbers / kOfSlot; ++i) {
    const int slot = i % kSlots, round = i / kSlots % 2;
    Counter &open = shared->open[slot], &free = shared->free[slot];
    if (thread == 0) {
      if (i >= kSlots && fault != 2) free.wait(1 - round);
      constexpr int kBytes = kOfSlot * static_cast<int>(sizeof(int));
      open.arrive(fault == 3 ? kBytes / 2 : kBytes);
      copy_bulk(shared->slots[slot], x + i * kOfSlot, kBytes, open);
    }
    const int at = thread - kWarp;
    if (at < 0 || at >= kOfSlot) continue;
    if (fault != 1 || i >= kSlots) open.wait(round);
    result[kNumbers - 1 - i * kOfSlot - at] = shared->slots[slot][at];
    free.arrive();
  }
}

constexpr int kOfBlock = 16;

__global__ void reverse_in_parts(const int* x, int* result, int* workspace, int blocks, int fault) {
  const int cluster = static_cast<int>(blockIdx.x) / blocks, width = blocks * kOfBlock;
  const int thread = static_cast<int>(threadIdx.x);
  const int own = static_cast<int>(block_of_cluster()) * kOfBlock + thread;
  int* const part = workspace + (fault == 0 ? cluster * width : 0);
  if (thread < kOfBlock) part[own] = x[cluster * width + own];
  __syncthreads();
  if (blocks > 1) sync_cluster();
  if (thread < kOfBlock) result[kNumbers - (cluster + 1) * width + own] = part[width - 1 - own];
}

const char* reversed_in_parts(const int* x, int* result, unsigned blocks, int fault,
                              Stream stream) {
  int workspace[kNumbers];
  return launch(reverse_in_parts, {kNumbers / kOfBlock, kWarp, 0, blocks}, stream, x, result,
                static_cast<int*>(workspace), static_cast<int>(blocks), fault);
}

}  // namespace

const char* planted_workspace(const int* x, int* result, int fault, Stream stream) {
  return reversed_in_parts(x, result, 1, fault, stream);
}

const char* planted_workspaces(const int* x, int* result, int fault, Stream stream) {
  return reversed_in_parts(x, result, 2, fault, stream);
}

const char* planted_barrier(const int* x, int* result, int fault, Stream stream) {
  return launch(reverse, {1, kNumbers}, stream, x, result, fault);
}

const char* planted_index(const int* x, int* result, int first, Stream stream) {
  return launch(copy, {1, kNumbers, kNumbers * sizeof(int)}, stream, x, result, first);
}

const char* planted_cluster(const int* x, int* result, int fault, Stream stream) {
  return launch(reverse_in_cluster, {2, kNumbers / 2, kNumbers / 2 * sizeof(int), 2}, stream, x,
                result, fault);
}

const char* planted_copy(const int* x, int* result, int fault, Stream stream) {
  return launch(copy_asynchronously, {1, kNumbers}, stream, x, result, fault);
}

const char* planted_ring(const int* x, int* result, int fault, Stream stream) {
  return launch(reverse_through_ring, {1, kNumbers, 4 << 10}, stream, x, result, fault);
}

}  // namespace mghf::cuda
