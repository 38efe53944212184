// The weights of the patch projection for products by warpgroups; see patches_rows.h.
#pragma once

#include "halves.h"
#include "patches_geometry.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

constexpr int kHalvesOfStep = 16;  // depths of a product
constexpr int kUnits = 128;        // of the hidden layer, with zeros
constexpr int kOutputs = 64;       // of the embedding, with zeros
constexpr int kMostParts = 2;      // of a factor: big and small
// Columns of weights are scaled to at most 16 and not to 2^14 like rows of patches, so that a sum
// overflows only where float32's would, or almost. What is lost is 2^-29 of the largest weight.
constexpr float kRoomForSums = 1024;

// The bytes of one part, big or small, of a step's weights for that many columns: cores of 8
// columns by 8 depths, those of 8 depths side by side.
__host__ __device__ constexpr int step_bytes(int columns) { return columns * kHalvesOfStep * 2; }
__host__ __device__ constexpr int core_bytes_along_depth(int columns) { return columns * 16; }
constexpr int kCoreBytes = 128;  // along the columns

// Both layers as two halves each, the columns multiplied by powers of two: [part][step][column].
// Products that are one (halves.h) need no small part. In the first layer a thread of a product has
// four neighbouring pixels of a row, so that it reads them at once: depths 2 t, 2 t + 1, 2 t + 8
// and 2 t + 9 are pixels 4 t ... 4 t + 3 of the step's sixteen.
struct RowsWeights {
  uint4 *first, *second;
  float *first_back, *second_back;  // what undoes the powers, (kUnits), (kOutputs)
  int steps;                        // of the first layer

  RowsWeights(int64_t pixels, Pieces& pieces) : steps(static_cast<int>(up(pixels, kHalvesOfStep))) {
    first = pieces.take<uint4>(int64_t{kMostParts} * steps * step_bytes(kUnits) / 16);
    second = pieces.take<uint4>(second_bytes() / 16);
    first_back = pieces.take<float>(kUnits);
    second_back = pieces.take<float>(kOutputs);
  }
  __host__ __device__ static constexpr int second_steps() { return kUnits / kHalvesOfStep; }
  __host__ __device__ static constexpr int second_bytes(int parts = kMostParts) {
    return parts * second_steps() * step_bytes(kOutputs);
  }
};

// The largest of the magnitudes of a column, by a warp.
template <class Weight>
__device__ __forceinline__ float largest_of_column(int depths, const Weight& weight) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  float largest = 0;
  MGHF_UNROLL(4)
  for (int depth = lane; depth < depths; depth += kWarp) {
    largest = fmaxf(largest, fabsf(weight(depth)));
  }
  MGHF_UNROLL_ALL
  for (int mask = 1; mask < kWarp; mask *= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, mask));
  }
  return largest;
}

// A warp packs a column of weights. `four_pixels`: depths are in the first layer's order.
template <class Weight>
__device__ __forceinline__ void pack_column(const PowerOfTwo& power, int column, int steps,
                                            int all_columns, bool four_pixels, uint4* to,
                                            const Weight& weight) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  MGHF_UNROLL(1)
  for (int eight = lane; eight < 2 * steps; eight += kWarp) {
    const int step = eight / 2, half = eight % 2;
    uint32_t big[4], small[4];
    MGHF_UNROLL_ALL
    for (int t = 0; t < 4; ++t) {
      const int depth =
          step * kHalvesOfStep + (four_pixels ? 4 * t + 2 * half : 8 * half + 2 * t);
      const SplitHalves two(weight(depth) * power.by, weight(depth + 1) * power.by);
      big[t] = two.big;
      small[t] = two.small;
    }
    uint4* const place = to + static_cast<int64_t>(eight) * all_columns + column;
    place[0] = {big[0], big[1], big[2], big[3]};
    place[int64_t{2} * steps * all_columns] = {small[0], small[1], small[2], small[3]};
  }
}

// A warp packs a column of a matrix of (columns, depths), or of (depths, columns).
__device__ __forceinline__ void pack_column_of(const float* weights, bool transposed, int column,
                                               int columns, int depths, int steps, int all_columns,
                                               bool four_pixels, uint4* to, float* back) {
  const auto weight = [&](int depth) {
    const int64_t at = transposed ? static_cast<int64_t>(depth) * columns + column
                                  : static_cast<int64_t>(column) * depths + depth;
    return column < columns && depth < depths ? weights[at] : 0.0f;
  };
  const PowerOfTwo power(largest_of_column(depths, weight) * kRoomForSums);
  if (threadIdx.x % kWarp == 0) back[column] = power.back;
  pack_column(power, column, steps, all_columns, four_pixels, to, weight);
}

constexpr int kWarpsOfPack = kThreads / kWarp;
constexpr int kPackBlocks = (kUnits + kOutputs) / kWarpsOfPack;

__device__ __forceinline__ int warp_of_pack() {
  return static_cast<int>(blockIdx.x) * kWarpsOfPack + static_cast<int>(threadIdx.x) / kWarp;
}

__global__ void __launch_bounds__(kThreads)
    pack_halves(RowsWeights to, const float* weight1, const float* weight2, int pixels, int hidden,
                int dimension) {
  const int column = warp_of_pack();
  if (column < kUnits) {
    pack_column_of(weight1, false, column, hidden, pixels, to.steps, kUnits, true, to.first,
                   to.first_back);
  } else {
    pack_column_of(weight2, false, column - kUnits, dimension, hidden, RowsWeights::second_steps(),
                   kOutputs, false, to.second, to.second_back);
  }
}

}  // namespace

}  // namespace mghf::cuda
