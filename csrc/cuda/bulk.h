// Copies of whole pieces of memory into shared memory that one thread starts and no thread makes,
// and the counters by which others know that they are there (compute capability 9.0 on).
//
// A counter counts the arrivals of one round: a number of threads, and the bytes that they
// announced with them. When all are in, the next round begins. A thread waits for a round by its
// parity, 0 for the first. For a slot of a ring, filled by one thread and read by many:
//
//     open.begin(1), free.begin(readers)       one thread, once; then publish_counters(), all
//     free.wait(parity of the round before)    except in the first round
//     open.arrive(bytes), copy_bulk(slot, from, bytes, open)
//     open.wait(parity), read the slot, free.arrive()
//
// The emulator copies when the first thread waits, or else when the next round begins, the latest
// time possible; a wait for what never comes ends the launch with an error.
#pragma once

#include "device.h"

namespace mghf::cuda {

class alignas(8) Counter {
 public:
  // For rounds of that many arrivals.
  __device__ __forceinline__ void begin(int arrivals) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
#elif !defined(__CUDACC__)
    host::begin_counter(this, arrivals);
#else
    (void)arrivals;
#endif
  }
  __device__ __forceinline__ void arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
#elif !defined(__CUDACC__)
    host::arrive(this, 0);
#endif
  }
  // Also announces bytes of copies to come.
  __device__ __forceinline__ void arrive(int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
#elif !defined(__CUDACC__)
    host::arrive(this, bytes);
#else
    (void)bytes;
#endif
  }
  // Waits until the round of that parity is over.
  __device__ __forceinline__ void wait(int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred over;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again;\n"
        "}" ::"r"(address()),
        "r"(parity)
        : "memory");
#elif !defined(__CUDACC__)
    host::wait_for_round(this, parity);
#else
    (void)parity;
#endif
  }
  __device__ __forceinline__ unsigned address() const {
#ifdef __CUDA_ARCH__
    return static_cast<unsigned>(__cvta_generic_to_shared(this));
#else
    return 0;
#endif
  }

 private:
  uint64_t state_;
};

// Makes the beginning of counters known to copies and other threads; also a barrier of the block.
__device__ __forceinline__ void publish_counters() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
}

// Copies bytes, a multiple of 16, between addresses that are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes,
                                          Counter& counter) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(global), "r"(bytes), "r"(counter.address())
      : "memory");
#elif !defined(__CUDACC__)
  host::copy_in_round(&counter, {shared, global, bytes, bytes});
#else
  (void)shared, (void)global, (void)bytes, (void)counter;
#endif
}

}  // namespace mghf::cuda
