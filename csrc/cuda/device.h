// What the CUDA sources are written in. nvcc compiles them for GPUs; any C++ compiler takes the same
// sources, and host.h runs their kernels on threads, so that they are tested, and raced, without a GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define MGHF_PRAGMA(text) _Pragma(#text)
#define MGHF_UNROLL(count) MGHF_PRAGMA(unroll count)
#define MGHF_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#else
#include "host.h"
#define MGHF_UNROLL(count)
#define MGHF_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::mghf::host::dynamic_shared())
#endif

namespace mghf::cuda {

using Stream = void*;

// Launches a kernel on a stream; returns what went wrong, or null.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   Stream stream, Arguments... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks >= int64_t{1} << 31) return "it has more blocks than a grid takes";
#ifdef __CUDACC__
  if (shared_bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  (void)stream;
  host::run(static_cast<unsigned>(blocks), threads, shared_bytes,
            [&] { kernel(static_cast<Parameters>(arguments)...); });
  return nullptr;
#endif
}

// ---- elements of images ----

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
__host__ __device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

__host__ __device__ __forceinline__ float to_float(float x) { return x; }
__host__ __device__ __forceinline__ float to_float(BFloat16 x) {
  return bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
__host__ __device__ __forceinline__ float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  // The exponent's bias differs by 112; the multiplication also normalises subnormal numbers.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const float finite = bits_as<float>(magnitude) * 5.192296858534828e33f;  // 2^112
  const uint32_t bits =
      magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : bits_as<uint32_t>(finite);
  return bits_as<float>(bits | static_cast<uint32_t>(x.bits & 0x8000) << 16);
#endif
}

}  // namespace mghf::cuda
