// Products of a block's rows with all keys by tensor cores, for `monce`: into the area of a solver,
// which has N columns for each of the block's rows (see sinkhorn_solver.h), and out of it.
//
// float32 is multiplied as three products of TF32, or as one if no more is asked for; float16 and
// bfloat16 have no more digits than TF32. The products over 8 depths are added up in float32
// outside the tensor cores, which truncate instead of rounding.
#pragma once

#include "matrix.h"
#include "mma.h"
#include "sinkhorn_solver.h"

namespace mghf::cuda {

constexpr int kTile = 16;    // rows
constexpr int kDepth = 32;   // of queries, staged at a time: 32 numbers for each row
constexpr int kColumns = 8;  // of a tensor core's product, which is also its depth

// `split`: whether the factors have small parts.
__device__ __forceinline__ void add_product(float (&sum)[4], const SplitA& a, const SplitB& b,
                                            bool split) {
  float d[4] = {};
  if (split) {
    mma_tf32(d, a.small, b.big);
    mma_tf32(d, a.big, b.small);
  }
  mma_tf32(d, a.big, b.big);
  MGHF_UNROLL_ALL
  for (int i = 0; i < 4; ++i) sum[i] += d[i];
}

__device__ __forceinline__ void put(uint32_t& big, uint32_t& small, float x) {
  big = nearest_tf32(x);  // which may be all there is
  small = SplitTf32(x).small;
}

// Two rows, or two columns, of a matrix; zeros where there are none. The code is the same for all
// types of elements, which only the reads depend on.
__device__ __forceinline__ SplitB read_two(const Matrices& m, int64_t b, const int (&rows)[2],
                                           const int (&columns)[2], int n, int depth) {
  float x[2] = {};
  with_element(m.element, [&](auto element) {
    const auto matrix = m.matrix<decltype(element)>(b);
    promise_global(matrix.data);
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      if (rows[i] < n && columns[i] < depth) x[i] = matrix(rows[i], columns[i]);
    }
  });
  SplitB split;
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) put(split.big[i], split.small[i], x[i]);
  return split;
}

// area = query key^T, of map `map`: rows `first` on of the query. A warp takes 8 keys and up to
// kTiles tiles of rows, so that a key is read once for them; the queries are staged in shared
// memory. A barrier of the block before and after. kOnChip: the area is in shared memory too.
template <int kTiles, bool kOnChip = false>
__device__ MGHF_NOINLINE void multiply_by_keys(Area area, float* staged, int tiles,
                                               Matrices query, Matrices key, int map, int first) {
  promise_shared(staged);
  if constexpr (kOnChip) promise_shared(area.numbers);
  const int n = static_cast<int>(key.rows), depth = static_cast<int>(key.columns);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, g = lane / 4, t = lane % 4;
  for (int start = 0; start == 0 || start < depth; start += kDepth) {
    for (int top = 0; top < area.rows; top += tiles * kTile) {
      __syncthreads();
      with_element(query.element, [&](auto element) {
        const auto matrix = query.matrix<decltype(element)>(map);
        MGHF_UNROLL(4)
        for (int x = thread; x < tiles * kTile * kDepth; x += threads) {
          const int r = x / kDepth, d = x % kDepth, i = first + top + r;
          const bool inside = top + r < area.rows && i < n && start + d < depth;
          staged[r * kDepth + (d ^ (r & 7) * 4)] = inside ? matrix(i, start + d) : 0;
        }
      });
      __syncthreads();
      MGHF_UNROLL(1)
      for (int left = thread / 32 * kColumns; left < n; left += threads / 32 * kColumns) {
        float sum[kTiles][4] = {};
        const int j = left + g;
        const float* const own = staged + g * kDepth;  // rows 8 apart have the same order
        MGHF_UNROLL(1)
        for (int step = 0; step < kDepth; step += kColumns) {
          const int d = start + step + t;
          const SplitB b = read_two(key, map, {j, j}, {d, d + 4}, n, depth);
          MGHF_UNROLL_ALL
          for (int tile = 0; tile < kTiles; ++tile) {
            if (tile >= tiles) continue;
            SplitA a;
            MGHF_UNROLL_ALL
            for (int i = 0; i < 4; ++i) {
              const int of = (step + t + i / 2 * 4) ^ g * 4;
              put(a.big[i], a.small[i], own[(tile * kTile + i % 2 * 8) * kDepth + of]);
            }
            add_product(sum[tile], a, b, key.element == Element::float32 && !key.once);
          }
        }
        MGHF_UNROLL_ALL
        for (int tile = 0; tile < kTiles; ++tile) {
          MGHF_UNROLL_ALL
          for (int half = 0; half < 2; ++half) {
            const int r = top + tile * kTile + g + half * 8;
            if (tile >= tiles || r >= area.rows) continue;
            float2& to = reinterpret_cast<float2&>(area.at(r, left + 2 * t));
            const float2 before = start == 0 ? float2{0, 0} : to;
            to = {before.x + sum[tile][2 * half], before.y + sum[tile][2 * half + 1]};
          }
        }
      }
    }
  }
  __syncthreads();
}

// result (n x depth, dense) = area keys for the block's rows, from `first` on. A warp takes 8
// columns of the result and kTiles tiles of rows. kOnChip: the area is in shared memory.
template <int kTiles, bool kOnChip = false>
__device__ MGHF_NOINLINE void multiply_area(Area area, Matrices key, void* result, int map,
                                            int first) {
  if constexpr (kOnChip) promise_shared(area.numbers);
  const int n = static_cast<int>(key.rows), depth = static_cast<int>(key.columns);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, g = lane / 4, t = lane % 4;
  for (int top = 0; top < area.rows; top += kTiles * kTile) {
    MGHF_UNROLL(1)
    for (int left = thread / 32 * kColumns; left < depth; left += threads / 32 * kColumns) {
      float sum[kTiles][4] = {};
      MGHF_UNROLL(1)
      for (int j = 0; j < n; j += kColumns) {
        const SplitB b = read_two(key, map, {j + t, j + t + 4}, {left + g, left + g}, n, depth);
        MGHF_UNROLL_ALL
        for (int tile = 0; tile < kTiles; ++tile) {
          SplitA a;
          MGHF_UNROLL_ALL
          for (int i = 0; i < 4; ++i) {
            const int r = top + tile * kTile + g + i % 2 * 8, column = j + t + i / 2 * 4;
            put(a.big[i], a.small[i], r < area.rows ? area.at(r, column) : 0);
          }
          add_product(sum[tile], a, b, !key.once);
        }
      }
      with_element(key.element, [&](auto element) {
        using T = decltype(element);
        T* const out = static_cast<T*>(result) + static_cast<int64_t>(map) * n * depth;
        MGHF_UNROLL_ALL
        for (int tile = 0; tile < kTiles; ++tile) {
          MGHF_UNROLL_ALL
          for (int i = 0; i < 4; ++i) {
            const int r = top + tile * kTile + g + i / 2 * 8, d = left + 2 * t + i % 2;
            const int64_t row = first + r;
            if (r < area.rows && row < n && d < depth) {
              out[row * depth + d] = from_float<T>(sum[tile][i]);
            }
          }
        }
      });
    }
  }
}

}  // namespace mghf::cuda
