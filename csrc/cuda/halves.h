// float32 as sums of two halves, so that products of float32 are three of halves: as exact as three
// of TF32, in half of the time and of the space (Ootomo and Yokota, 2022). A half has fewer
// exponents, so numbers are first multiplied by a power of two that brings the largest of them
// close to the largest half. What is lost then is at most 2^-23 of a number or 2^-38 of the largest
// one.
//
// Where TF32 or bfloat16 is asked for one product of the big parts takes the place of the three. A
// half has 11 significant bits, as TF32 has, and the power of two makes up for its fewer exponents:
// only numbers below 2^-27 of the largest have fewer bits.
#pragma once

#include "mma.h"

namespace mghf::cuda {

// Powers of two: `by` brings a largest magnitude to 2^13 ... 2^14, `back` undoes it. An infinity or
// a NaN stays where it is.
struct PowerOfTwo {
  float by, back;

  PowerOfTwo() = default;
  __device__ __forceinline__ explicit PowerOfTwo(float largest) {
    constexpr uint32_t kLeast = 14, kOne = 127, kUnscaled = kOne + 13, kNotFinite = 255;
    uint32_t exponent = bits_as<uint32_t>(largest) >> 23 & 0xff;
    exponent = exponent == kNotFinite ? kUnscaled : exponent > kLeast ? exponent : kLeast;
    by = bits_as<float>((kOne + kUnscaled - exponent) << 23);
    back = bits_as<float>((kOne + exponent - kUnscaled) << 23);
  }
};

// 2^-n of 2^n.
__device__ __forceinline__ float inverse_of_power(float power) {
  return bits_as<float>((254u << 23) - bits_as<uint32_t>(power));
}

// Two neighbouring numbers of at most 2^14. `small` of an infinity is a NaN.
struct SplitHalves {
  uint32_t big, small;

  SplitHalves() = default;
  __device__ __forceinline__ SplitHalves(float first, float second)
      : big(pair_of<Half>(first, second)),
        small(pair_of<Half>(first - to_float(Half{static_cast<uint16_t>(big)}),
                            second - to_float(Half{static_cast<uint16_t>(big >> 16)}))) {}
};

}  // namespace mghf::cuda
