// The inner loop of every matrix product: one block of the result in registers.
#pragma once

#include "vector.h"

namespace mghf {
namespace {

// The shape of a block that fills the registers: rows, and vectors of columns.
constexpr int kBlockRows = 6;
#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;
#else
constexpr int kBlockVectors = 2;
#endif

// block[m][n] += sum_k a(m, k) b(k, n) over `depth` values of k; a(m, k) = a[m a_row + k a_step],
// b(k, n) is the n-th vector from b + k b_step (aligned). Of either operand any layout will do whose
// columns of b lie side by side, so the transposed products need no transposed copy of a.
template <int kM, int kN>
inline void multiply_add(Vec (&block)[kM][kN], const float* a, int64_t a_row, int64_t a_step,
                         const float* b, int64_t b_step, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) columns[n] = at(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const Vec row = splat(a[m * a_row]);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) block[m][n] += row * columns[n];
    }
    a += a_step;
    b += b_step;
  }
}

// Covers `rows` x `vectors` with blocks: calls visit.template operator()<kM, kN>(m, n) with the
// block's first row and first vector. Blocks of one column of blocks follow each other, so that the
// columns of b stay in the cache.
template <int kM, class Visit>
inline void for_each_row_block(int64_t rows, const Visit& visit) {
  int64_t m = 0;
  for (; m + kM <= rows; m += kM) visit.template operator()<kM>(m);
  if constexpr (kM > 1) {
    for_each_row_block<kM / 2>(rows - m, [&]<int kFewer>(int64_t k) {
      visit.template operator()<kFewer>(m + k);
    });
  }
}

template <class Visit>
inline void for_each_block(int64_t rows, int64_t vectors, const Visit& visit) {
  int64_t n = 0;
  for (; n + kBlockVectors <= vectors; n += kBlockVectors) {
    for_each_row_block<kBlockRows>(rows, [&]<int kM>(int64_t m) {
      visit.template operator()<kM, kBlockVectors>(m, n);
    });
  }
  for (; n < vectors; ++n) {
    for_each_row_block<kBlockRows>(
        rows, [&]<int kM>(int64_t m) { visit.template operator()<kM, 1>(m, n); });
  }
}

}  // namespace
}  // namespace mghf
