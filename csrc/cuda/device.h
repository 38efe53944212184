// The language of the CUDA sources. nvcc compiles them for GPUs; any C++ compiler takes the same
// sources, and host/emulator.h runs their kernels, so that tests, also for races, need no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../common/warp.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define MGHF_PRAGMA(text) _Pragma(#text)
#define MGHF_UNROLL(count) MGHF_PRAGMA(unroll count)
#define MGHF_UNROLL_ALL MGHF_PRAGMA(unroll)
#define MGHF_NOINLINE __noinline__
#define MGHF_DYNAMIC_SHARED(type, name)                         \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#include "host/emulator.h"
#define MGHF_UNROLL(count)
#define MGHF_UNROLL_ALL
#define MGHF_NOINLINE
#define MGHF_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::mghf::host::dynamic_shared())
#endif

namespace mghf::cuda {

using Stream = void*;

// How a kernel is launched. Blocks of a cluster, from compute capability 9.0 on, reach each other's
// dynamic shared memory; on the host they have no other shared memory.
struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  unsigned blocks_of_cluster = 1;
  int registers = 0;  // of a thread at most, if known; only the emulator looks at it
};

// Dynamic shared memory that every kernel may have without allow_shared().
constexpr size_t kSharedBytesOfAll = 48 << 10;

// Calls `allow` unless at least that many bytes were allowed to that kernel on that device before:
// the driver's call takes microseconds and is needed once. Thread-safe. Returns an error text, or
// null.
const char* allow_once(const void* kernel, int device, size_t bytes,
                       const std::function<const char*()>& allow);

// Allows a kernel that many bytes on the current device; likewise.
const char* allow_shared(const void* kernel, size_t bytes);

// Launches a kernel on a stream; returns an error text, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const Grid& grid, Stream stream,
                   Arguments... arguments) {
  if (grid.blocks == 0) return nullptr;
  if (grid.blocks >= int64_t{1} << 31) return "it has more blocks than a grid takes";
#ifdef __CUDACC__
  if (grid.shared_bytes > kSharedBytesOfAll) {
    const char* const error =
        allow_shared(reinterpret_cast<const void*>(kernel), grid.shared_bytes);
    if (error != nullptr) return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.blocks_of_cluster, 1, 1};
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = {static_cast<unsigned>(grid.blocks), 1, 1};
  configuration.blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  configuration.dynamicSmemBytes = grid.shared_bytes;
  configuration.stream = static_cast<cudaStream_t>(stream);
  configuration.attrs = &cluster;
  configuration.numAttrs = grid.blocks_of_cluster > 1 ? 1 : 0;
  const cudaError_t error =
      cudaLaunchKernelEx(&configuration, kernel, static_cast<Parameters>(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  if (host::counting.on) {
    host::counting.kernels.push_back({reinterpret_cast<const void*>(kernel),
                                      host::parameters(static_cast<Parameters>(arguments)...),
                                      static_cast<unsigned>(grid.blocks), grid.blocks_of_cluster,
                                      grid.threads, grid.shared_bytes});
  }
  return host::run(static_cast<unsigned>(grid.blocks), grid.blocks_of_cluster, grid.threads,
                   grid.shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); });
#endif
}

// Properties of the current device by which kernels are chosen, as far as the code that runs was
// compiled for them: PTX for 8.0 has no clusters on any GPU.
struct Gpu {
  int64_t shared_bytes;  // that a block may have
  bool clusters;
};

// The result is cached for each device.
const char* current_gpu(Gpu& gpu);

// How many clusters of that grid's size (of one block: blocks) of a kernel run at a time on the
// current device; cached. 0 if it has no room for one.
const char* running_at_a_time(const void* kernel, const Grid& grid, int64_t& clusters);

// Whether the architecture that is being compiled for has clusters.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif

// Marks code that is never launched, so that the compiler drops what follows.
__device__ __forceinline__ void never() {
#ifdef __CUDA_ARCH__
  __trap();
  __builtin_unreachable();
#endif
}

template <class To, class From>
__host__ __device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// These promise, in a function that is not inlined, that a pointer is to shared or to global
// memory; otherwise loads use generic addresses, which are slower.
__device__ __forceinline__ void promise_global(const void* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isGlobal(pointer));
#else
  (void)pointer;
#endif
}
__device__ __forceinline__ void promise_shared(const void* pointer) {
#ifdef __CUDA_ARCH__
  __builtin_assume(__isShared(pointer));
#else
  (void)pointer;
#endif
}

// The same number, whose origin the compiler does not see: values that depend on it are recomputed
// instead of being kept in registers.
template <class Integer>
__device__ __forceinline__ Integer opaque(Integer number) {
  static_assert(sizeof number == 4);
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(number));
#endif
  return number;
}

// ---- clusters ----

__device__ __forceinline__ unsigned block_of_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(__CUDACC__)
  return 0;
#else
  return host::cluster_rank();
#endif
}

// Also a barrier of each block, and no more than that where a cluster has one block: ptxas makes a
// branch of it.
__device__ __forceinline__ void sync_cluster() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#elif defined(__CUDACC__)
  __syncthreads();
#else
  host::sync_cluster();
#endif
}

// The address, in the shared memory of the block of that rank, that corresponds to `own` in this
// one's.
template <class T>
__device__ __forceinline__ T* of_block(T* own, unsigned rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(own), "r"(rank));
  return reinterpret_cast<T*>(address);
#elif defined(__CUDACC__)
  (void)rank;
  return own;
#else
  return static_cast<T*>(host::dynamic_shared_of(rank, own));
#endif
}

// ---- copies into shared memory that a thread need not wait for ----

// Copies 4, 8 or 16 aligned bytes: `present` of them come from memory, the rest are zeros.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int present = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(present)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(global),
                 "r"(present), "n"(kBytes)
                 : "memory");
  }
#elif !defined(__CUDACC__)
  host::copy_later({shared, global, kBytes, present});
#endif
}
// Ends a group of the thread's copies.
__device__ __forceinline__ void end_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
  host::end_group_of_copies();
#endif
}
// Waits until at most the last kGroups groups of the thread's own copies are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
  host::wait_for_copies(kGroups);
#endif
}

}  // namespace mghf::cuda
