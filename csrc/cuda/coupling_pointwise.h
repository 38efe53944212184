// The pointwise functions of the op `coupling`. A NaN stays one.
#pragma once

#include <math.h>

#include "coupling.h"

namespace mghf::cuda {

// The value at what came out of a layer, in place. All numbers at once: one branch.
template <int kCount>
__device__ __forceinline__ void activate(float* x, Activation activation) {
  if (activation == Activation::softplus) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kCount; ++i) {
      x[i] = (x[i] < 0 ? 0 : x[i]) + log1pf(expf(-fabsf(x[i])));
    }
    return;
  }
  const bool relu6 = activation == Activation::relu6;
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) {
    const float below = relu6 ? 0.0f : 0.01f * x[i];
    const float value = x[i] < 0 ? below : x[i];
    x[i] = relu6 && value > 6 ? 6.0f : value;
  }
}

// g times the derivative at x, in place. Times zero and not zero, for a NaN or an infinite g.
template <int kCount>
__device__ __forceinline__ void go_back(float* g, const float* x, Activation activation) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) {
    if (activation == Activation::softplus) {
      g[i] = g[i] / (1.0f + expf(-x[i]));
    } else if (activation == Activation::relu6) {
      g[i] *= x[i] > 0 && x[i] < 6 ? 1.0f : 0.0f;
    } else {
      g[i] *= x[i] > 0 ? 1.0f : 0.01f;
    }
  }
}

// The same from the value instead of x.
template <int kCount>
__device__ __forceinline__ void go_back_from_value(float* g, const float* value,
                                                   Activation activation) {
  if (activation != Activation::softplus) return go_back<kCount>(g, value, activation);
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) g[i] *= -expm1f(-value[i]);
}

__device__ __forceinline__ float log_scale_of(float raw, float clamp) {
  return clamp > 0 ? clamp * tanhf(raw / clamp) : raw;
}

}  // namespace mghf::cuda
