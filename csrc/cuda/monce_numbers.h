// What the newer kernels of `monce` share: limits, powers of two, and the functions of its losses.
#pragma once

#include "sinkhorn_problem.h"

#include "../common/sinkhorn_settling.h"  // after the definition of __device__

namespace mghf::cuda {

namespace {

constexpr int kMostDepth = 64;
constexpr float kLeastSum = 1e-33f, kMostSum = 1e33f;  // of rows and columns, and of their inverses
// Added to the exponents a in the state, so that they are not zeros.
constexpr float kMark = 12582912.0f;  // 1.5 * 2^23
// Relative part of the gradient that the recursion may leave out.
constexpr float kNegligiblePart = 5e-7f;

// A factor from packed similarities, which are below 2^36, to exponents of two; large enough that
// 1e30 of it, which takes the place of entries that do not count, leaves nothing. It would not where
// the exponents of similarity and contrast cancel, or for tiny embeddings.
__device__ __forceinline__ float factor_that_hides(float factor) {
  constexpr float kLeast = 1e-20f;
  return fabsf(factor) < kLeast ? (factor < 0 ? -kLeast : kLeast) : factor;
}

// 2^x to 2e-7, 0 for results below float32's normal range.
__device__ __forceinline__ float power_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126 ? 0 : exp2f(x);
#endif
}

// 1 / x to 2^-23, for what is neither below float32's normal range nor above 2^126.
__device__ __forceinline__ float inverse_of(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

__device__ __forceinline__ float softplus_of(float x) {
  return (x > 0 ? x : 0) + log1pf(expf(-fabsf(x)));
}
__device__ __forceinline__ float sigmoid_of(float x) {
  const float decay = expf(-fabsf(x));
  return (x > 0 ? 1 : decay) * inverse_of(1 + decay);
}

}  // namespace

}  // namespace mghf::cuda
