// The activation of rows of hidden values, and the powers of two that make them factors.
//
// relu6 keeps values within [0, 6], so that one power of two is for all (coupling_rows_weights.h).
// leaky_relu's have no bound that is known before: a row in the ring has each pixel's largest
// magnitude beside it, and what the 3x3 layer makes of a pixel is at most the largest of its window
// times the largest sum of a channel's taps. That may be far above what it is, which costs nothing:
// two halves lose 2^-38 of the bound.
#pragma once

#include "coupling_rows_factors.h"

namespace mghf::cuda {

namespace {

// relu6, or a multiple of it that ends at `six`; or leaky_relu. A NaN stays one.
template <bool kLeaky>
__device__ __forceinline__ float activated(float x, float six) {
#ifdef __CUDA_ARCH__
  float result;
  if constexpr (kLeaky) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(0.01f * x));
  } else {
    float positive;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(positive) : "f"(x));
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(positive), "f"(six));
  }
  return result;
#else
  if (kLeaky) return x < 0 ? 0.01f * x : x;
  const float positive = x < 0 ? 0 : x;
  return positive > six ? six : positive;
#endif
}

// The largest magnitudes of a thread's two pixels, of a row that it makes: they are in all of the
// four threads that have channels of these pixels.
struct LargestOfRow {
  float of[2] = {};

  __device__ __forceinline__ void note(int i, const float (&quad)[4]) {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) of[i] = fmaxf(of[i], fabsf(quad[q]));
  }
  // Writes those of all threads, for 64 pixels.
  __device__ __forceinline__ void keep(float* row) const {
    const PlaceInRow place;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const float pair = fmaxf(of[i], __shfl_xor_sync(kAllLanes, of[i], 1));
      const float all = fmaxf(pair, __shfl_xor_sync(kAllLanes, pair, 2));
      if (place.lane == i) row[place.pixel + i] = all;
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
