// Shared by the kernels of `patches`: the rows and columns of their products, the place of a thread
// in them, and weights as factors.
#pragma once

#include "patches.h"

#include <math.h>

#include "mma.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kNormFloor = 1e-7f;
constexpr float kTiny = 1.1754943508222875e-38f;  // the smallest normal number

// A block's result is 128 rows x 128 columns: that of a warp 32 x 64, in 2 x 8 tiles of 16 x 8.
constexpr int kRows = 128;
constexpr int kColumns = 128;
constexpr int kRowTiles = 2;
constexpr int kColumnTiles = 8;
// The number of tiles of columns that a warp skips together if none of their columns exists.
constexpr int kRun = 4;
static_assert(kRun == 4, "as add_four_tiles takes them");

__host__ __device__ constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The patches of all maps, and the sizes of a projection.
struct Patches {
  int64_t maps, channels;
  int rows, columns;  // of patches in a map
  int size, stride, hidden, dimension;
  bool maps_fastest;
  // Whether products of TF32, and those of bfloat16, are one each instead of three.
  bool once, once_in_halves;

  template <class AnyImage>
  Patches(const AnyImage& x, const Projection& p)
      : maps(x.batch * x.channels),
        channels(x.channels),
        rows(static_cast<int>((x.height - p.patch_size) / p.stride + 1)),
        columns(static_cast<int>((x.width - p.patch_size) / p.stride + 1)),
        size(static_cast<int>(p.patch_size)),
        // An item beyond the image has no patch further on either.
        stride(static_cast<int>(
            smaller(p.stride, x.height > x.width ? x.height : x.width))),
        hidden(static_cast<int>(p.hidden)),
        dimension(static_cast<int>(p.dimension)),
        maps_fastest(x.channel_stride < x.column_stride),
        once(p.precision != Precision::float32),
        once_in_halves(p.precision == Precision::bfloat16) {}

  __host__ __device__ int64_t of_map() const { return static_cast<int64_t>(rows) * columns; }
  __host__ __device__ int64_t number() const { return maps * of_map(); }
  __host__ __device__ int pixels() const { return size * size; }
  __host__ __device__ int state_words() const { return 1 + (hidden + 31) / 32; }
};

// A row of the matrices: the pair of an item of `items` and a map.
struct Row {
  int64_t item, map;

  __device__ __forceinline__ Row(int64_t row, int64_t maps, int64_t items, bool maps_fastest)
      : item(maps_fastest ? row / maps : row % items),
        map(maps_fastest ? row % maps : row / items) {}
};

// A thread's place in the block's result: rows row + 8 i, columns column + 8 j and the next one.
struct ThreadPlace {
  int warp, g, t;
  int row, column;  // its first ones
  int warp_column;

  __device__ __forceinline__ ThreadPlace()
      : warp(static_cast<int>(threadIdx.x) / kWarp),
        g(static_cast<int>(threadIdx.x) % kWarp / 4),
        t(static_cast<int>(threadIdx.x) % 4),
        row(warp % 4 * 32 + g),
        column(warp / 4 * 64 + 2 * t),
        warp_column(warp / 4 * 64) {}
};

// Offset in the image of a patch's or a cell's first pixel.
template <class AnyImage>
__device__ __forceinline__ int64_t first_pixel(const AnyImage& x, int64_t channels, int64_t map,
                                               int64_t item, int columns, int stride) {
  return map / channels * x.batch_stride + map % channels * x.channel_stride +
         item / columns * stride * x.row_stride + item % columns * stride * x.column_stride;
}

// ---- weights as factors ----

// A matrix of columns by depths, as two TF32 each, in the order in which tensor cores take them:
// [128 columns][8 depths][8 columns][lane]. It is split once per call, not by every block.
constexpr int kTilesOfGroup = kColumns / 8;
constexpr int kStepsOfSlice = 2;  // of 8 depths; whole slices, with zeros

struct Factor {
  const float* from;
  int64_t columns, depths, column_stride, depth_stride;
  uint4* to;
  int steps;  // of 8 depths

  Factor() = default;
  Factor(const float* from, int64_t columns, int64_t depths, int64_t column_stride,
         int64_t depth_stride)
      : from(from),
        columns(columns),
        depths(depths),
        column_stride(column_stride),
        depth_stride(depth_stride),
        to(nullptr),
        steps(static_cast<int>(up(depths, 8 * kStepsOfSlice) * kStepsOfSlice)) {}

  __host__ __device__ int64_t size() const {
    return up(columns, kColumns) * steps * kTilesOfGroup * kWarp;
  }
  // Points to 8 depths of a lane's column; the next tiles of columns follow at steps of kWarp.
  __device__ __forceinline__ const uint4* at(int column, int depth) const {
    const int step = column / kColumns * steps + depth / 8;
    return to + (int64_t{step} * kTilesOfGroup + column % kColumns / 8) * kWarp +
           threadIdx.x % kWarp;
  }
  __device__ void pack(int64_t i) const {
    const int64_t lane = i % kWarp, tile = i / kWarp % kTilesOfGroup;
    const int64_t step = i / (kWarp * kTilesOfGroup) % steps;
    const int64_t column = i / (kWarp * kTilesOfGroup) / steps * kColumns + tile * 8 + lane / 4;
    const auto number = [&](int64_t depth) {
      return column < columns && depth < depths
                 ? from[column * column_stride + depth * depth_stride]
                 : 0.0f;
    };
    const float first = number(step * 8 + lane % 4), second = number(step * 8 + lane % 4 + 4);
    to[i] = {nearest_tf32(first), nearest_tf32(second), SplitTf32(first).small,
             SplitTf32(second).small};
  }
};

__global__ void __launch_bounds__(kThreads) pack(Factor one, Factor other) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < one.size()) {
    one.pack(i);
  } else if (i - one.size() < other.size()) {
    other.pack(i - one.size());
  }
}

__device__ __forceinline__ SplitB factor_of(const uint4& packed) {
  return {{packed.x, packed.y}, {packed.z, packed.w}};
}

// Four of a factor's tiles in turn, because there are no registers for more.
template <bool kExactA, bool kOnce, int kAll>
__device__ __forceinline__ void add_four_tiles(float (&sums)[kRowTiles][kAll][4], int first,
                                               const SplitA (&a)[kRowTiles], const uint4* packed) {
  MGHF_UNROLL_ALL
  for (int j = 0; j < 4; ++j) {
    const SplitB b[1] = {factor_of(packed[j * kWarp])};
    add_products<TripleTf32, kExactA, kOnce>(sums, first + j, a, b);
  }
}

template <bool kOnce = false>
__device__ __forceinline__ void put(SplitA& a, int part, float x) {
  if constexpr (kOnce) {
    a.big[part] = nearest_tf32(x);
    return;
  }
  const SplitTf32 split(x);
  a.big[part] = split.big;
  a.small[part] = split.small;
}

}  // namespace

}  // namespace mghf::cuda
