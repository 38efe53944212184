// Vectors of float32 and powers of two, for kernels that are compiled once per instruction set.
//
// Everything has internal linkage, and no inline function of a library header is used: the linker
// would keep one copy of it for the whole library, perhaps the one with instructions that this
// machine lacks.

#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>  // index_sequence, a type

namespace mghf {
namespace {

// ---- vectors ----

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16, kRows = 8;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8, kRows = 4;
#else
constexpr int64_t kLanes = 4, kRows = 4;
#endif
// kRows: rows that a kernel works on at a time; two vectors a row must fit the registers.

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(float))));
typedef float UnalignedVec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

inline Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
inline const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
// The same for memory that is not aligned to whole vectors.
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
// x - 0 is x and costs nothing; x + 0 would cost an addition, because -0 + 0 is 0.
inline Vec splat(float x) { return x - Vec{}; }
// A word of 32 bits that need not be a number: nothing may compute with it.
inline Vec splat_word(const void* p) {
  int32_t word;
  __builtin_memcpy(&word, p, sizeof word);
  return reinterpret_cast<Vec>(IntVec{} | word);
}
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & 0x7fffffff); }

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline float smallest(Vec x) {
  float result = x[0];
  for (int64_t i = 1; i < kLanes; ++i) result = x[i] < result ? x[i] : result;
  return result;
}

inline float largest(Vec x) { return -smallest(-x); }

// combine((a0, a2, ..., b0, b2, ...), (a1, a3, ..., b1, b3, ...))
template <class Combine, size_t... I>
inline Vec combine_pairs(Vec a, Vec b, const Combine& combine, std::index_sequence<I...>) {
#if defined(__clang__)
  return combine(__builtin_shufflevector(a, b, (2 * I)...),
                 __builtin_shufflevector(a, b, (2 * I + 1)...));
#else
  return combine(__builtin_shuffle(a, b, IntVec{(2 * static_cast<int32_t>(I))...}),
                 __builtin_shuffle(a, b, IntVec{(2 * static_cast<int32_t>(I) + 1)...}));
#endif
}

// Reduces each of kRows vectors to one number by `combine`; the results are in the first kRows
// lanes.
template <class Combine>
inline Vec horizontal(Vec (&x)[kRows], const Combine& combine) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int64_t count = kRows; count > 1; count /= 2) {
    for (int64_t i = 0; i < count / 2; ++i) {
      x[i] = combine_pairs(x[2 * i], x[2 * i + 1], combine, lanes);
    }
  }
  for (int64_t left = kLanes; left > kRows; left /= 2) {
    x[0] = combine_pairs(x[0], x[0], combine, lanes);
  }
  return x[0];
}

inline Vec horizontal_sums(Vec (&x)[kRows]) {
  return horizontal(x, [](Vec a, Vec b) { return a + b; });
}

inline float sum(Vec x) {
  for (int64_t lanes = kLanes; lanes > 1; lanes /= 2) {
    x = combine_pairs(x, x, [](Vec a, Vec b) { return a + b; }, std::make_index_sequence<kLanes>());
  }
  return x[0];
}

// ---- powers of two ----

// A factor split so that score * factor loses nothing: `high` has 12 bits.
struct Factor {
  float value, high, low;
};

inline float upper_bits(float x) {
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, x) & ~0xfff);
}

Factor make_factor(double value) {
  const float rounded = static_cast<float>(value);
  const float high = upper_bits(rounded);
  return {rounded, high, static_cast<float>(value - static_cast<double>(high))};
}

inline Vec round_to_integer(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23; right for |x| < 2^22
  return (x + magic) - magic;
}

// 2^x on [-0.5, 0.5], fitted at Chebyshev nodes: relative error 2e-8 before rounding.
inline Vec power_of_two_within_half(Vec x) {
  Vec p = splat(0.0001546986459288746f);
  p = p * x + 0.0013400566531345248f;
  p = p * x + 0.00961802527308464f;
  p = p * x + 0.05550326779484749f;
  p = p * x + 0.24022650718688965f;
  p = p * x + 0.6931471824645996f;
  p = p * x + 1.0f;
  return p;
}

// 2^(score * factor) = power * 2^exponent, exponent an integer, power about 0.7 to 1.4. The error
// is that of `power` alone, 1e-7, however large the exponent.
struct Power {
  Vec exponent, power;
};

inline Power power_of_two(Vec score, const Factor& factor) {
  const Vec exponent = round_to_integer(score * factor.value);
  const Vec high = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(score) & ~0xfff);
  const Vec low = score - high;
  const Vec x = (high * factor.high - exponent) + (high * factor.low + low * factor.value);
  return {exponent, power_of_two_within_half(x)};
}

// 2^exponent for an integer exponent; 0 below float32's normal range, infinity above it.
inline Vec scale(Vec exponent) {
  const Vec clamped = min(max(exponent, splat(-127.0f)), splat(128.0f));
  return reinterpret_cast<Vec>((__builtin_convertvector(clamped, IntVec) + 127) << 23);
}

inline float scale(float exponent) { return scale(splat(exponent))[0]; }

// 2^x for x in [-125, 1], where x need not be split: as exact as x itself.
inline Vec small_power_of_two(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x + magic;  // the nearest integer, in the lowest bits
  const Vec power = power_of_two_within_half(x - (shifted - magic));
  // Unsigned, because the exponents wrap around.
  typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(float))));
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(power) +
                               (reinterpret_cast<Bits>(shifted) << 23));
}

inline Vec exponential(Vec x) {
  const Power p = power_of_two(x, make_factor(1.4426950408889634));
  return p.power * scale(p.exponent);
}

}  // namespace
}  // namespace mghf
