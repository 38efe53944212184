// Elements of images.
#pragma once

#include <type_traits>

#include "device.h"

namespace mghf::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
__host__ __device__ __forceinline__ T from_float(float x);

template <>
__host__ __device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__host__ __device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
#ifdef __CUDA_ARCH__
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}
template <>
__host__ __device__ __forceinline__ Half from_float<Half>(float x) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 0x38800000) {
    // A subnormal number is a multiple of 2^-24, as is the last place of 0.5 in float32.
    const uint32_t shifted = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13))};
#endif
}

// Two numbers, the first in the lower half, rounded to T. Both together take one instruction, a
// single bfloat16 several.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
#else
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
#endif
}

// Four contiguous numbers, aligned to the size of all of them.
__device__ __forceinline__ void load_four(float (&to)[4], const float* from) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
template <class T>
__device__ __forceinline__ void load_four(float (&to)[4], const T* from) {
  const uint64_t bits = *reinterpret_cast<const uint64_t*>(from);
  MGHF_UNROLL_ALL
  for (int i = 0; i < 4; ++i) to[i] = to_float(T{static_cast<uint16_t>(bits >> (16 * i))});
}
__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
}
template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&from)[4]) {
  const uint64_t low = pair_of<T>(from[0], from[1]), high = pair_of<T>(from[2], from[3]);
  *reinterpret_cast<uint64_t*>(to) = low | high << 32;
}

}  // namespace mghf::cuda
