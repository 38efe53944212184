// Powers of two, logarithms and functions of these, to float32's precision, by the same operations
// on a GPU and on the host.
#pragma once

#include <math.h>

#include "numbers.h"

namespace mghf::cuda {

// A factor for exact products: `low` is the rounding error of `value`.
struct Factor {
  float value, low;

  explicit Factor(double factor)
      : value(static_cast<float>(factor)),
        low(static_cast<float>(factor - static_cast<double>(value))) {}
};

// Right for |x| < 2^22.
__device__ __forceinline__ float round_to_integer(float x) {
  return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
}

// The same, and up to |x| = 2^24 an integer at most 1 away from x.
__device__ __forceinline__ float integer_near(float x) {
  const float shift = copysignf(12582912.0f, x);
  return (x + shift) - shift;
}

// 2^x on [-0.5, 0.5], fitted at Chebyshev nodes: relative error 2e-8 before rounding; 2e-5 on
// [-1, 1], 6e-3 on [-2, 2].
__device__ __forceinline__ float power_of_two_within_half(float x) {
  float p = 0.0001546986459288746f;
  p = fmaf(p, x, 0.0013400566531345248f);
  p = fmaf(p, x, 0.00961802527308464f);
  p = fmaf(p, x, 0.05550326779484749f);
  p = fmaf(p, x, 0.24022650718688965f);
  p = fmaf(p, x, 0.6931471824645996f);
  return fmaf(p, x, 1.0f);
}

// 2^(x factor) = power * 2^exponent, exponent an integer, power about 0.7 to 1.4. The error is that
// of `power` alone, 1e-7, for exponents up to 2^22, above which `power` may be 0.25 to 4.
struct Power {
  float exponent, power;
};

__device__ __forceinline__ Power power_of_two(float x, float value, float low) {
  const float exponent = integer_near(x * value);
  return {exponent, power_of_two_within_half(fmaf(x, low, fmaf(x, value, -exponent)))};
}
__device__ __forceinline__ Power power_of_two(float x, const Factor& factor) {
  return power_of_two(x, factor.value, factor.low);
}

// 2^exponent for an integer exponent; 0 below float32's normal range, infinity above it.
__device__ __forceinline__ float scale(float exponent) {
  const float least = exponent > -127 ? exponent : -127;
  return bits_as<float>((static_cast<int>(least < 128 ? least : 128) + 127) << 23);
}

// e^x to 1e-7 in half of the instructions of exponential(); e^-86 below that, NaN where e^x is
// beyond float32.
__device__ __forceinline__ float short_exponential(float x) {
  constexpr float kLog2E = 1.44269502e+00f, kLow = 1.92596299e-08f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the exponent
  x = fminf(fmaxf(x, -86.0f), 89.0f);
  const float sum = fmaf(x, kLog2E, kShift), exponent = sum - kShift;
  const float power = power_of_two_within_half(fmaf(x, kLow, fmaf(x, kLog2E, -exponent)));
  return bits_as<float>(bits_as<uint32_t>(power) + (bits_as<uint32_t>(sum) << 23));
}

// e^x, no more than e^most; NaN for NaN.
__device__ __forceinline__ float exponential(float x, float most = 200) {
  const float within = x < -200 ? -200 : x > most ? most : x;
  const Power p = power_of_two(within, 1.44269502e+00f, 1.92596299e-08f);
  return p.power * scale(p.exponent);
}

}  // namespace mghf::cuda
