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
// b(k, n) is the n-th vector from b + k b_step (aligned). Any layout of a will do, so a transposed
// product needs no transposed copy.
//
// Not inlined, because the compiler runs out of registers among the callers' code.
template <int kM, int kN>
__attribute__((noinline)) void multiply_add(Vec (&block)[kM][kN], const float* a, int64_t a_row,
                                            int64_t a_step, const float* b, int64_t b_step,
                                            int64_t depth) {
  Vec sums[kM][kN];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) sums[m][n] = block[m][n];
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec columns[kN];
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) columns[n] = at(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const Vec row = splat(a[m * a_row]);
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) sums[m][n] += row * columns[n];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) block[m][n] = sums[m][n];
  }
}

// Calls visit.template operator()<kM>(m) with blocks of kBlockRows rows, and one of the rest.
template <class Visit>
inline void for_each_row_block(int64_t rows, const Visit& visit) {
  int64_t m = 0;
  for (; m + kBlockRows <= rows; m += kBlockRows) visit.template operator()<kBlockRows>(m);
  switch (rows - m) {
    case 5: visit.template operator()<5>(m); break;
    case 4: visit.template operator()<4>(m); break;
    case 3: visit.template operator()<3>(m); break;
    case 2: visit.template operator()<2>(m); break;
    case 1: visit.template operator()<1>(m); break;
    default: break;
  }
}

// Covers `rows` x `vectors` with blocks: calls visit.template operator()<kM, kN>(m, n) with the
// block's first row and first vector. It goes down one column of blocks after the other, so that
// the columns of b stay in the cache.
template <class Visit>
inline void for_each_block(int64_t rows, int64_t vectors, const Visit& visit) {
  int64_t n = 0;
  for (; n + kBlockVectors <= vectors; n += kBlockVectors) {
    for_each_row_block(
        rows, [&]<int kM>(int64_t m) { visit.template operator()<kM, kBlockVectors>(m, n); });
  }
  for (; n < vectors; ++n) {
    for_each_row_block(rows, [&]<int kM>(int64_t m) { visit.template operator()<kM, 1>(m, n); });
  }
}

// ---- blocks whose size is known at run time only: less code where there are many products ----

// As multiply_add() above, with at most kBlockRows rows, and kBlockVectors vectors or one:
// block[m kN + n].
template <int kN>
inline void multiply_add(Vec* block, int64_t rows, const float* a, int64_t a_row, int64_t a_step,
                         const float* b, int64_t b_step, int64_t depth) {
  const auto run = [&]<int kM>() {
    multiply_add(*reinterpret_cast<Vec(*)[kM][kN]>(block), a, a_row, a_step, b, b_step, depth);
  };
  switch (rows) {
    case 6: run.template operator()<6>(); break;
    case 5: run.template operator()<5>(); break;
    case 4: run.template operator()<4>(); break;
    case 3: run.template operator()<3>(); break;
    case 2: run.template operator()<2>(); break;
    default: run.template operator()<1>(); break;
  }
}

// As for_each_block(): calls visit(m, n, rows, vectors) with a block's first row and vector, and
// its numbers of rows and vectors.
template <class Visit>
inline void for_each_sized_block(int64_t rows, int64_t vectors, const Visit& visit) {
  for (int64_t n = 0; n < vectors;) {
    const int64_t width = n + kBlockVectors <= vectors ? kBlockVectors : 1;
    for (int64_t m = 0; m < rows; m += kBlockRows) {
      visit(m, n, rows - m < kBlockRows ? rows - m : kBlockRows, width);
    }
    n += width;
  }
}

inline void multiply_add(Vec* block, int64_t rows, int64_t vectors, const float* a, int64_t a_row,
                         int64_t a_step, const float* b, int64_t b_step, int64_t depth) {
  if (vectors == 1) {
    multiply_add<1>(block, rows, a, a_row, a_step, b, b_step, depth);
  } else {
    multiply_add<kBlockVectors>(block, rows, a, a_row, a_step, b, b_step, depth);
  }
}

// ---- products with a packed right-hand side ----
//
// A matrix b(k, n) packed into panels as wide as a block: panel after panel, each with its columns
// of k = 0, 1, ... side by side. Remaining vectors that do not fill a panel are panels of one
// vector. Columns are padded to whole vectors with zeros.

inline int64_t packed_floats(int64_t depth, int64_t columns) {
  return depth * round_up(columns, kLanes);
}

template <class Entry>
void pack(int64_t depth, int64_t columns, const Entry& entry, float* packed) {
  const int64_t vectors = round_up(columns, kLanes) / kLanes;
  for (int64_t n = 0; n < vectors;) {
    const int64_t width = (n + kBlockVectors <= vectors ? kBlockVectors : 1) * kLanes;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t j = n * kLanes; j < n * kLanes + width; ++j) {
        *packed++ = j < columns ? entry(k, j) : 0.0f;
      }
    }
    n += width / kLanes;
  }
}

// Calls store(m, n, value) with every vector n of every row m of a b. The columns of a lie in
// kSegments runs of `depth` steps: those of row m start at a[.] + m a_row, one step per column.
// Runs that are null count as zeros.
template <int kSegments, class Store>
inline void multiply(int64_t rows, int64_t vectors, const float* const (&a)[kSegments],
                     int64_t a_row, int64_t depth, const float* packed, const Store& store) {
  for_each_sized_block(rows, vectors, [&](int64_t m, int64_t n, int64_t height, int64_t width) {
    Vec block[kBlockRows * kBlockVectors] = {};
    const float* panel = packed + n * kLanes * kSegments * depth;
    for (int s = 0; s < kSegments; ++s, panel += depth * width * kLanes) {
      if (a[s] == nullptr) continue;
      multiply_add(block, height, width, a[s] + m * a_row, a_row, 1, panel, width * kLanes, depth);
    }
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) store(m + i, n + j, block[i * width + j]);
    }
  });
}

template <class Store>
inline void multiply(int64_t rows, int64_t vectors, const float* a, int64_t a_row, int64_t depth,
                     const float* packed, const Store& store) {
  const float* const runs[1] = {a};
  multiply(rows, vectors, runs, a_row, depth, packed, store);
}

}  // namespace
}  // namespace mghf
