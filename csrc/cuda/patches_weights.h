// The gradients of the weights and biases; see patches.cu.
#pragma once

#include "patches_geometry.h"

namespace mghf::cuda {

namespace {

// partial[split] = left^T [right, 1] over a run of rows: (left_columns, right_columns + 1), whose
// last column is a bias's gradient. A block has 64 x 64 of it; a warp 32 x 32. kImplicit:
// the right factor is the rows' patches in the image, not a matrix.
//
// Predicted: d_W1 reads d_h and x, 163 MB (38 us); R 128 1024 = 7.4 G multiply-adds by three
// products of TF32: 148 us. It copies into shared memory element by element, without prefetching,
// so twice this is expected.
constexpr int kOuterThreads = 128;
constexpr int kOuter = 64;
constexpr int kOuterPitch = kOuter + 8;

struct OuterProduct {
  int64_t rows, run;  // rows of a split
  int left_columns, right_columns, splits;

  OuterProduct(int64_t rows, int64_t left, int64_t right)
      : rows(rows),
        left_columns(static_cast<int>(left)),
        right_columns(static_cast<int>(right)) {
    // Enough blocks to fill a GPU, but at least 256 rows for each partial result.
    const int64_t most = smaller(smaller(1024 / (tiles() + 1), 64), rows / 256);
    run = up(up(rows, most > 0 ? most : 1), kDepth) * kDepth;
    splits = rows > 0 ? static_cast<int>(up(rows, run)) : 0;
  }
  int64_t tiles() const { return up(left_columns, kOuter) * up(right_columns + 1, kOuter); }
  __host__ __device__ int64_t size() const {
    return static_cast<int64_t>(left_columns) * (right_columns + 1);
  }
};

template <class T, bool kImplicit>
__global__ void __launch_bounds__(kOuterThreads)
    outer_product(Image<T> x, Patches p, OuterProduct o, const float* left_rows,
                  const float* right_rows, float* partial) {
  __shared__ float left[kDepth * kOuterPitch], right[kDepth * kOuterPitch];
  __shared__ int64_t first_pixels[kDepth], pixel_places[kOuter];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int g = thread % kWarp / 4, t = thread % 4;
  const int right_tiles = static_cast<int>(up(o.right_columns + 1, kOuter));
  const int tiles = right_tiles * static_cast<int>(up(o.left_columns, kOuter));
  const int block = static_cast<int>(blockIdx.x), split = block / tiles, tile = block % tiles;
  const int first_m = tile / right_tiles * kOuter, first_n = tile % right_tiles * kOuter;
  const int64_t begin = split * o.run, end = smaller(begin + o.run, o.rows);
  float sums[2][4][4] = {};

  if (kImplicit && thread < kOuter) {
    const int n = first_n + thread;
    pixel_places[thread] = n / p.size * x.row_stride + n % p.size * x.column_stride;
  }
  for (int64_t first = begin; first < end; first += kDepth) {
    __syncthreads();  // the last slice has been used
    if (kImplicit && thread < kDepth) {
      const Row row(first + thread, p.maps, p.of_map(), p.maps_fastest);
      first_pixels[thread] = first_pixel(x, p.channels, row.map, row.item, p.columns, p.stride);
    }
    if (kImplicit) __syncthreads();
    MGHF_UNROLL(4)
    for (int c = thread; c < kDepth * kOuter; c += kOuterThreads) {
      const int k = c / kOuter, m = c % kOuter;
      left[k * kOuterPitch + m] =
          first + k < end ? at_or_zero(left_rows, first + k, o.rows, first_m + m, o.left_columns)
                          : 0.0f;
    }
    // Neighbouring threads read contiguous memory.
    const bool down = kImplicit && p.maps_fastest;
    MGHF_UNROLL(4)
    for (int c = thread; c < kDepth * kOuter; c += kOuterThreads) {
      const int k = down ? c % kDepth : c / kOuter, column = down ? c / kDepth : c % kOuter;
      const int n = first_n + column;
      float value = 0;
      if (first + k < end && n < o.right_columns) {
        if constexpr (kImplicit) {
          value = to_float(x.data[first_pixels[k] + pixel_places[column]]);
        } else {
          value = right_rows[(first + k) * o.right_columns + n];
        }
      } else if (first + k < end && n == o.right_columns) {
        value = 1;
      }
      right[k * kOuterPitch + column] = value;
    }
    __syncthreads();
    MGHF_UNROLL(1)
    for (int k = 0; k < kDepth; k += 8) {
      SplitA a[2];
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        MGHF_UNROLL_ALL
        for (int part = 0; part < 4; ++part) {
          const int m = warp / 2 * 32 + 16 * i + g + part % 2 * 8;
          put(a[i], part, left[(k + t + part / 2 * 4) * kOuterPitch + m]);
        }
      }
      MGHF_UNROLL_ALL
      for (int j = 0; j < 4; j += 2) {
        SplitB b[2];
        MGHF_UNROLL_ALL
        for (int n = 0; n < 4; ++n) {
          const SplitTf32 both(right[(k + t + n % 2 * 4) * kOuterPitch + warp % 2 * 32 +
                                     8 * (j + n / 2) + g]);
          b[n / 2].big[n % 2] = both.big;
          b[n / 2].small[n % 2] = both.small;
        }
        add_products<TripleTf32, false>(sums, j, a, b);
      }
    }
  }

  float* const result = partial + split * o.size();
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    MGHF_UNROLL_ALL
    for (int j = 0; j < 4; ++j) {
      MGHF_UNROLL_ALL
      for (int part = 0; part < 4; ++part) {
        const int64_t m = first_m + warp / 2 * 32 + 16 * i + g + part / 2 * 8;
        const int column_of = first_n + warp % 2 * 32 + 8 * j + 2 * t + part % 2;
        if (m < o.left_columns && column_of <= o.right_columns) {
          result[m * (o.right_columns + 1) + column_of] = sums[i][j][part];
        }
      }
    }
  }
}

// The sum over the splits, in order; the last column is the bias's.
__global__ void __launch_bounds__(kThreads)
    add_splits(OuterProduct o, const float* partial, float* weight, float* bias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= o.size()) return;
  double sum = 0;
  for (int split = 0; split < o.splits; ++split) {
    sum += static_cast<double>(partial[split * o.size() + i]);
  }
  const int64_t row = i / (o.right_columns + 1), column = i % (o.right_columns + 1);
  float* const target =
      column < o.right_columns ? weight + row * o.right_columns + column : bias + row;
  *target = static_cast<float>(sum);
}

}  // namespace

}  // namespace mghf::cuda
