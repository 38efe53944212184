// The pointwise functions of the op `coupling`, on vectors. A NaN stays one.
#pragma once

#include "coupling.h"
#include "vector.h"

namespace mghf {
namespace {

inline Vec expm(Vec x) {
  // Beyond these bounds the result is 0 or infinite; the comparisons let a NaN through.
  x = splat(-150.0f) > x ? splat(-150.0f) : x;
  x = splat(150.0f) < x ? splat(150.0f) : x;
  return exponential(x);
}

// log(1 + u), 0 <= u <= 1, as 2 artanh(u / (2 + u)).
inline Vec log_one_plus(Vec u) {
  const Vec s = u / (u + 2.0f), q = s * s;
  Vec p = splat(1.0f / 15);
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * s * (p * q + 1.0f);
}

inline Vec tanh(Vec x) {
  const Vec q = x * x;
  Vec p = splat(62.0f / 2835);
  p = p * q - 17.0f / 315;
  p = p * q + 2.0f / 15;
  p = p * q - 1.0f / 3;
  const Vec small = x + x * q * p;
  const Vec large = 1.0f - 2.0f / (expm(2.0f * x) + 1.0f);
  return abs(x) < 0.25f ? small : large;
}

template <Activation kind>
inline Vec activate(Vec x) {
  if constexpr (kind == Activation::relu6) {
    x = splat(0.0f) > x ? splat(0.0f) : x;
    return splat(6.0f) < x ? splat(6.0f) : x;
  } else if constexpr (kind == Activation::softplus) {
    return (x > 0.0f ? x : x * 0.0f) + log_one_plus(expm(-abs(x)));
  } else {
    return x > 0.0f ? x : 0.01f * x;
  }
}

// The activation's derivative times g, from the activation's value.
template <Activation kind>
inline Vec through(Vec value, Vec g) {
  if constexpr (kind == Activation::relu6) {
    return (value > 0.0f) & (value < 6.0f) ? g : splat(0.0f);
  } else if constexpr (kind == Activation::softplus) {
    const Vec small = value * (1.0f - value * (0.5f - value * (1.0f / 6)));
    return g * (value < 0.01f ? small : 1.0f - expm(-value));
  } else {
    return value > 0.0f ? g : 0.01f * g;
  }
}

}  // namespace
}  // namespace mghf
