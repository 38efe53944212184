// Work that the last block to end does for the others, in the same launch.
#pragma once

#include "device.h"

namespace mghf::cuda {

// Whether this block is the last of `blocks` that ask at a counter, which was 0 before. The last
// one sees what all threads of the others have written before they asked. All threads of a block
// ask, and get one answer.
__device__ __forceinline__ bool is_last(int* counter, int64_t blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// For kernels whose last block has nothing to do.
struct Nothing {
  static constexpr bool kWanted = false;
};

}  // namespace mghf::cuda
