// Register blocks of the op `patches`: a vector's lanes are maps, weights are shared by all lanes.
// Products are of float32 or, where the CPU has instructions for them, of bfloat16 in pairs with
// float32 sums: a word of 32 bits holds two neighbours along the sum, the first in its lower half.
#pragma once

#include "vector.h"
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(MGHF_AMX)
#include "amx.h"
#endif

namespace mghf {
namespace {

// kUnits x kPatches vectors of a block, kPatches operands and a weight fill the registers.
#if defined(__AVX512F__)
constexpr int kUnits = 8, kPatches = 3;
#else
constexpr int kUnits = 4, kPatches = 3;
#endif

struct Floats {
  static constexpr int kWidth = 1;  // factors in a word
  static Vec weight(const float* p) { return splat(*p); }
  static Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kWidth = 2;
  static Vec weight(const float* p) { return splat_word(p); }
  static Vec add_product(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // Vectors, not intrinsics, because GCC 12 warns about its own intrinsics here.
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));

  // Words of two vectors of floats, rounded to bfloat16.
  static Vec pair(Vec first, Vec second) {
    const auto round = [](Vec x) {
      return __builtin_convertvector((Halves)_mm512_cvtneps_pbh(x), Words);
    };
    return (Vec)(round(first) | round(second) << 16);
  }

  // Packs data[p] and data[p + 1], whose values are bfloat16 numbers, into the word data[p]. The
  // last of `count` vectors is not changed.
  static void pair_neighbours(float* data, int64_t count) {
    for (int64_t p = 0; p + 1 < count; ++p) {
      const Words first = (Words)at(data + p * kLanes), second = (Words)at(data + (p + 1) * kLanes);
      at(data + p * kLanes) = (Vec)(first >> 16 | (second & 0xffff0000u));
    }
  }
};
#endif

// block[m][n] += sum_k a(m, k) b(n, k) over `depth` words k: a(m, k) = a[m a_row + k a_step] is a
// weight, b(n, k) the vector at b[n] + k kStep kLanes.
template <class Factors, int kStep, int kM, int kN>
inline void add_products(Vec (&block)[kM][kN], const float* a, int64_t a_row, int64_t a_step,
                         const float* const (&b)[kN], int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) columns[n] = at(b[n] + k * kStep * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const Vec row = Factors::weight(a + m * a_row);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) block[m][n] = Factors::add_product(block[m][n], row, columns[n]);
    }
    a += a_step;
  }
}

#if defined(MGHF_AMX)
constexpr int64_t kTileWords = kTileBytes / 4;

// The same block as tiles: kTileRows weights x kN patches, words by kTileWords at a time.
template <int kN>
struct PatchTiles {
  static_assert(kN <= 3);

  static void zero_sums() {
    tile_zero<0>();
    if constexpr (kN > 1) tile_zero<1>();
    if constexpr (kN > 2) tile_zero<2>();
  }
  // at(n) points to the sums of patch n, [weight][lane].
  template <class At>
  static void load_sums(const At& at) {
    tile_load<0>(at(0), kTileBytes);
    if constexpr (kN > 1) tile_load<1>(at(1), kTileBytes);
    if constexpr (kN > 2) tile_load<2>(at(2), kTileBytes);
  }
  template <class At>
  static void store_sums(const At& at) {
    tile_store<0>(at(0), kTileBytes);
    if constexpr (kN > 1) tile_store<1>(at(1), kTileBytes);
    if constexpr (kN > 2) tile_store<2>(at(2), kTileBytes);
  }
  // a(m, k) = a[m a_row + k], b(n, k) the vector at b(n) + k b_step.
  template <class Columns>
  static void add_products(const float* a, int64_t a_row, const Columns& b, int64_t b_step) {
    tile_load<3>(a, a_row * 4);
    tile_load<4>(b(0), b_step * 4);
    tile_multiply_add<0, 3, 4>();
    if constexpr (kN > 1) {
      tile_load<5>(b(1), b_step * 4);
      tile_multiply_add<1, 3, 5>();
    }
    if constexpr (kN > 2) {
      tile_load<6>(b(2), b_step * 4);
      tile_multiply_add<2, 3, 6>();
    }
  }
};
#else
struct Tiles {};
#endif

// Covers `count` rows of blocks: visit.template operator()<kM>(m) from row m on, kM at most kMost.
template <int kMost, class Visit>
inline void for_each_run(int64_t count, const Visit& visit) {
  int64_t m = 0;
  for (; m + kMost <= count; m += kMost) visit.template operator()<kMost>(m);
  if constexpr (kMost > 1) {
    for_each_run<kMost / 2>(
        count - m, [&]<int kFewer>(int64_t k) { visit.template operator()<kFewer>(m + k); });
  }
}

}  // namespace
}  // namespace mghf
