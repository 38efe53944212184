// Kernels with a fault, or without it, for the tests that the sanitizers find such faults.
#include "planted.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = 64;

// Reverses 64 numbers through shared memory.
template <bool kBarrier>
__global__ void reverse(const int* x, int* result) {
  __shared__ int shared[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = x[thread];
  if (kBarrier) __syncthreads();
  result[thread] = shared[kThreads - 1 - thread];
}

__global__ void copy(const int* x, int* result, int first) {
  MGHF_DYNAMIC_SHARED(int, shared);
  const int thread = static_cast<int>(threadIdx.x);
  shared[first + thread] = x[thread];
  __syncthreads();
  result[thread] = shared[first + thread];
}

}  // namespace

const char* planted_race(const int* x, int* result, bool barrier, Stream stream) {
  return launch(barrier ? reverse<true> : reverse<false>, 1, kThreads, 0, stream, x, result);
}

const char* planted_index(const int* x, int* result, int first, Stream stream) {
  return launch(copy, 1, kThreads, kThreads * sizeof(int), stream, x, result, first);
}

}  // namespace mghf::cuda
