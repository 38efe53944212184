// The pointwise functions of the op `coupling`. A NaN stays one.
#pragma once

#include <math.h>

#include "coupling.h"

namespace mghf::cuda {

// Not inlined, because code that few callers need would otherwise be repeated throughout a kernel.
template <int kCount>
struct Numbers {
  float of[kCount];
};
template <int kCount>
__device__ MGHF_NOINLINE Numbers<kCount> softplus(Numbers<kCount> x) {
  MGHF_UNROLL_ALL
  for (float& v : x.of) v = (v < 0 ? 0 : v) + log1pf(expf(-fabsf(v)));
  return x;
}
template <int kCount>
__device__ MGHF_NOINLINE Numbers<kCount> softplus_slope(Numbers<kCount> x) {
  MGHF_UNROLL_ALL
  for (float& v : x.of) v = 1.0f / (1.0f + expf(-v));
  return x;
}
template <int kCount>
__device__ MGHF_NOINLINE Numbers<kCount> softplus_slope_at_value(Numbers<kCount> value) {
  MGHF_UNROLL_ALL
  for (float& v : value.of) v = -expm1f(-v);
  return value;
}
inline __device__ MGHF_NOINLINE float soft_clamp(float x, float bound) {
  return bound * tanhf(x / bound);
}

template <int kCount>
__device__ __forceinline__ Numbers<kCount> numbers(const float* x) {
  Numbers<kCount> numbers;
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) numbers.of[i] = x[i];
  return numbers;
}

// Applies the activation in place, to all numbers at once, so that there is one branch.
template <int kCount>
__device__ __forceinline__ void activate(float* x, Activation activation) {
  if (activation == Activation::softplus) {
    const Numbers<kCount> values = softplus(numbers<kCount>(x));
    MGHF_UNROLL_ALL
    for (int i = 0; i < kCount; ++i) x[i] = values.of[i];
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

// Whether an activation with kinks, at 0 and for relu6 at 6, has slope 1 at x or at its value,
// which has the same sign; not at a NaN.
__device__ __forceinline__ bool is_steep(float x, bool relu6, float six = 6) {
  return x > 0 && !(relu6 && x >= six);
}
// Its other slope.
__host__ __device__ __forceinline__ float flat_slope(Activation activation) {
  return activation == Activation::relu6 ? 0.0f : 0.01f;
}

// g times the derivative of such an activation, in place. It multiplies by zero instead of setting
// zero, for a NaN or an infinite g.
template <int kCount>
__device__ __forceinline__ void go_back_by_kinks(float* g, const float* x, Activation activation) {
  const bool relu6 = activation == Activation::relu6;
  const float flat = flat_slope(activation);
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) g[i] *= is_steep(x[i], relu6) ? 1.0f : flat;
}
template <int kCount>
__device__ __forceinline__ void multiply(float* g, const Numbers<kCount>& slopes) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < kCount; ++i) g[i] *= slopes.of[i];
}

// g times the derivative at x, in place.
template <int kCount>
__device__ __forceinline__ void go_back(float* g, const float* x, Activation activation) {
  if (activation != Activation::softplus) return go_back_by_kinks<kCount>(g, x, activation);
  multiply(g, softplus_slope(numbers<kCount>(x)));
}

// The same from the value instead of x.
template <int kCount>
__device__ __forceinline__ void go_back_from_value(float* g, const float* value,
                                                   Activation activation) {
  if (activation != Activation::softplus) return go_back_by_kinks<kCount>(g, value, activation);
  multiply(g, softplus_slope_at_value(numbers<kCount>(value)));
}

__device__ __forceinline__ float log_scale_of(float raw, float clamp) {
  return clamp > 0 ? soft_clamp(raw, clamp) : raw;
}

}  // namespace mghf::cuda
