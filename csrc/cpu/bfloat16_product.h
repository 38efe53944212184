// Matrix products of bfloat16 with float32 sums, where the CPU has instructions for them:
// AVX512-BF16 or, with MGHF_AMX, AMX. The counterpart of product.h.
//
// The instructions take two columns of a at a time, so b is packed with b(k, n) and b(k + 1, n)
// side by side, in panels of 32 columns. The depth is padded with zeros to a multiple of 32; rows
// of a must be readable up to there, with finite values. Rows of a are read in blocks, up to 16
// rows beyond the last.
#pragma once

#if defined(__AVX512BF16__) || defined(MGHF_AMX)

#include "product.h"
#if defined(MGHF_AMX)
#include "amx.h"
#endif
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace mghf {
namespace {

typedef uint16_t BFloat16;
constexpr int64_t kPairDepth = 32;

inline int64_t packed_values(int64_t depth, int64_t columns) {
  return round_up(depth, kPairDepth) * round_up(columns, 2 * kLanes);
}

template <class Entry, class Round>
void pack(int64_t depth, int64_t columns, const Entry& entry, BFloat16* packed,
          const Round& to_bfloat16) {
  for (int64_t n = 0; n < columns; n += 2 * kLanes) {
    for (int64_t k = 0; k < round_up(depth, kPairDepth); k += 2) {
      for (int64_t j = n; j < n + 2 * kLanes; ++j) {
        for (int64_t i = k; i < k + 2; ++i) {
          *packed++ = i < depth && j < columns ? to_bfloat16(entry(i, j)) : BFloat16{0};
        }
      }
    }
  }
}

#if defined(__AVX512BF16__)

inline void to_bfloat16(Vec x, BFloat16* out) {
  const auto halves = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(out, &halves, sizeof halves);
}

constexpr int kPairRows = 12;

template <int kM>
__attribute__((noinline)) void multiply_pairs(Vec (*block)[2], const BFloat16* a, int64_t a_row,
                                              const BFloat16* b, int64_t depth) {
  Vec sums[kM][2] = {};
  for (int64_t k = 0; k < depth; k += 2) {
    const auto first = (__m512bh)at(reinterpret_cast<const float*>(b));
    const auto second = (__m512bh)at(reinterpret_cast<const float*>(b + 2 * kLanes));
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const auto row = (__m512bh)splat_word(a + m * a_row + k);
      sums[m][0] = _mm512_dpbf16_ps(sums[m][0], row, first);
      sums[m][1] = _mm512_dpbf16_ps(sums[m][1], row, second);
    }
    b += 4 * kLanes;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    block[m][0] = sums[m][0];
    block[m][1] = sums[m][1];
  }
}

// block[m] = the two vectors of row m of a b; rows in blocks of 12, 4 and 1.
inline void multiply_pairs(Vec (*block)[2], int64_t rows, const BFloat16* a, int64_t a_row,
                           const BFloat16* b, int64_t depth) {
  if (rows == kPairRows) return multiply_pairs<kPairRows>(block, a, a_row, b, depth);
  int64_t m = 0;
  for (; m + 4 <= rows; m += 4) multiply_pairs<4>(block + m, a + m * a_row, a_row, b, depth);
  for (; m < rows; ++m) multiply_pairs<1>(block + m, a + m * a_row, a_row, b, depth);
}

#endif

// Calls store(m, n, value) with every vector n of every row m of a b, `vectors` of them.
template <class Store>
inline void multiply(int64_t rows, int64_t vectors, const BFloat16* a, int64_t a_row, int64_t depth,
                     const BFloat16* packed, const Store& store) {
  const int64_t padded = round_up(depth, kPairDepth);
  for (int64_t n = 0; n < vectors; n += 2) {
    const BFloat16* panel = packed + n * kLanes * padded;
    const int64_t width = n + 1 < vectors ? 2 : 1;
#if defined(MGHF_AMX)
    constexpr int64_t kPanelBytes = 2 * kTileBytes;
    for (int64_t m = 0; m < rows; m += 2 * kTileRows) {
      tile_zero<0>();
      tile_zero<1>();
      tile_zero<2>();
      tile_zero<3>();
      const bool both = m + kTileRows < rows;
      for (int64_t k = 0; k < padded; k += kPairDepth) {
        const BFloat16* columns = panel + k * 2 * kLanes;
        tile_load<4>(a + m * a_row + k, a_row * 2);
        tile_load<6>(columns, kPanelBytes);
        tile_load<7>(columns + 2 * kLanes, kPanelBytes);
        tile_multiply_add<0, 4, 6>();
        tile_multiply_add<1, 4, 7>();
        if (!both) continue;
        tile_load<5>(a + (m + kTileRows) * a_row + k, a_row * 2);
        tile_multiply_add<2, 5, 6>();
        tile_multiply_add<3, 5, 7>();
      }
      alignas(64) float block[2 * kTileRows][2 * kLanes];
      tile_store<0>(&block[0][0], sizeof block[0]);
      tile_store<1>(&block[0][kLanes], sizeof block[0]);
      tile_store<2>(&block[kTileRows][0], sizeof block[0]);
      tile_store<3>(&block[kTileRows][kLanes], sizeof block[0]);
      const int64_t count = rows - m < 2 * kTileRows ? rows - m : 2 * kTileRows;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < width; ++j) store(m + i, n + j, at(&block[i][j * kLanes]));
      }
    }
#else
    for (int64_t m = 0; m < rows; m += kPairRows) {
      const int64_t height = rows - m < kPairRows ? rows - m : kPairRows;
      Vec block[kPairRows][2];
      multiply_pairs(block, height, a + m * a_row, a_row, panel, padded);
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) store(m + i, n + j, block[i][j]);
      }
    }
#endif
  }
}

}  // namespace
}  // namespace mghf

#endif
