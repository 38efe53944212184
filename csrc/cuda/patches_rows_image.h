// The gradient of an image where products of warpgroups and bulk copies are (compute
// capability 9.0a); see patches_image.h for the mathematics, patches.cu for the sizes.
#pragma once

#include "patches_rows_hidden.h"

namespace mghf::cuda {

namespace {

// A block takes 128 cells of the image, with d_h of all patches that cover them in shared memory:
// they are consecutive, so one copy brings them. It goes through the tiles of a cell, 64 pixels
// each, and for each tile through the patches that cover it, a stage of packed weights each, which
// a warp has copied into a ring. Two warpgroups of 64 cells each load the rows of d_h as factors
// from where they lie; a cell without such a patch takes a row of zeros. After each stage, products
// over the 128 units, the sums are added up outside the tensor cores, where a patch's power of two
// is undone. Every pixel is written once, or added to once, so results do not depend on an order.
//
// Predicted for an H200, stages of 64 pixels (16 for patches of 32 x 32 at stride 24), a block:
//   tensor cores   128 64 128 multiply-adds by three products, 2048 a cycle: 1,540 cycles a stage
//   shared memory  64 KB of d_h and 96 KB of weights read, 32 KB written: 1,540 cycles a stage
//   second cache   32 KB of weights: 1,380 cycles a stage at 5.5 TB/s for all SMs; 80 KB of d_h
// 484 blocks of 16 stages on 132 SMs, one at a time: 55 us on average and 66 us in four rounds. A
// block's own pixels, read and written, take 62 us of memory's time in all, little of it beside its
// products: 100 to 130 us are expected. With one product for three a stage takes 510 cycles of
// tensor cores, 640 of shared memory and 690 of the second cache: 70 to 95 us.
constexpr int kMostGradientStages = 4;

struct ImageControl {
  Counter open[kMostGradientStages], free[kMostGradientStages], patches;
  uint4 zeros[kMostWords];
};

// The most patches that cover a block's cells.
__host__ __device__ constexpr int most_patches(int terms, int columns) {
  return kRows + (terms - 1) * (columns + 1) + 2;
}

inline int64_t gradient_stages_within(int64_t shared_bytes, const Regions& regions, int columns,
                                      int parts) {
  const int64_t patches = int64_t{most_patches(regions.terms, columns)} * parts * kWordsOfPart *
                          static_cast<int64_t>(sizeof(uint4));
  const int64_t rest = shared_bytes - static_cast<int64_t>(sizeof(ImageControl)) - patches;
  return smaller(rest / GradientWeights::stage_bytes(parts), kMostGradientStages);
}

// A cell of the image, and the number of the patch that begins in it (where there is one).
struct Cell {
  int64_t map, patch;
  int i, j;

  __device__ __forceinline__ Cell(int64_t cell, const Patches& p, const Regions& regions) {
    const Row row(cell, p.maps, regions.cells(), false);
    map = row.map;
    i = static_cast<int>(row.item / regions.cell_columns);
    j = static_cast<int>(row.item % regions.cell_columns);
    patch = map * p.of_map() + static_cast<int64_t>(i) * p.columns + j;
  }
  // The number of the patch that begins s rows and t columns of cells before it, or -1.
  __device__ __forceinline__ int64_t before(int s, int t, const Patches& p) const {
    const bool exists = i >= s && i - s < p.rows && j >= t && j - t < p.columns;
    return exists ? patch - static_cast<int64_t>(s) * p.columns - t : -1;
  }
};

// The patches from the first one that covers a block's cells to the last.
struct PatchRange {
  int64_t first;
  int number;

  __device__ __forceinline__ PatchRange(int64_t first_cell, const Patches& p,
                                        const Regions& regions) {
    const int64_t cells = p.maps * regions.cells();
    const Cell from(first_cell, p, regions);
    const Cell to(smaller(first_cell + kRows, cells) - 1, p, regions);
    const int back = regions.terms - 1;
    const int64_t of_first_map = from.map * p.of_map();
    const int64_t earliest = from.patch - static_cast<int64_t>(back) * (p.columns + 1);
    first = earliest > of_first_map ? earliest : of_first_map;
    // Past the last row or column of patches it is the last one before.
    const int64_t latest =
        to.i < p.rows ? static_cast<int64_t>(to.i) * p.columns + smaller(to.j, p.columns - 1)
                      : p.of_map() - 1;
    const int64_t end = to.map * p.of_map() + latest + 1;
    number = first < end ? static_cast<int>(end - first) : 0;
  }
};

// Copies d_h and fills the stages, in a ring.
template <int kParts>
__device__ __forceinline__ void copy_for_gradient(unsigned char* stages, int number, uint4* rows,
                                                  ImageControl& control, const PatchRange& range,
                                                  const HiddenGradient& hidden,
                                                  const GradientWeights& weights) {
  constexpr int kBytes = GradientWeights::stage_bytes(kParts);
  constexpr int kStride = GradientWeights::stage_bytes() / 16, kWords = kParts * kWordsOfPart;
  const int bytes = range.number * kWords * static_cast<int>(sizeof(uint4));
  control.patches.arrive(bytes);
  if (bytes > 0) {
    copy_bulk(rows, hidden.words + range.first * kWords, bytes, control.patches);
  }
  int slot = 0, parity = 1;
  MGHF_UNROLL(1)
  for (int stage = 0; stage < weights.stages; ++stage) {
    if (stage >= number) control.free[slot].wait(parity);
    control.open[slot].arrive(kBytes);
    copy_bulk(stages + slot * kBytes, weights.first + int64_t{stage} * kStride, kBytes,
              control.open[slot]);
    if (++slot == number) slot = 0, parity ^= 1;
  }
}

// Two neighbouring pixels, read and written at once.
template <class T>
struct PixelPair {
  uint32_t bits;

  __device__ __forceinline__ void set(float first, float second) {
    bits = pair_of<T>(first, second);
  }
  __device__ __forceinline__ float first() const {
    return to_float(T{static_cast<uint16_t>(bits)});
  }
  __device__ __forceinline__ float second() const {
    return to_float(T{static_cast<uint16_t>(bits >> 16)});
  }
};
template <>
struct PixelPair<float> {
  Two<float> numbers;

  __device__ __forceinline__ void set(float first, float second) { numbers = {first, second}; }
  __device__ __forceinline__ float first() const { return numbers.first; }
  __device__ __forceinline__ float second() const { return numbers.second; }
};

// A thread's sums of a tile, into the image.
template <class T>
__device__ __forceinline__ void finish_tile(const float (&sums)[kCellPixels / 2], const Tile& tile,
                                            const float* backs, T* const (&cells)[2],
                                            const int (&heights)[2], const int (&widths)[2],
                                            int64_t row_stride, bool add) {
  constexpr int kPairs = kCellPixels / 8;
  const int t = static_cast<int>(threadIdx.x) % 4;
  const auto columns = static_cast<unsigned>(tile.columns);
  // All that is read is asked for before any of it is used, so that it is waited for once.
  int64_t offsets[kPairs];
  bool exists[2][kPairs];
  PixelPair<T> pairs[2][kPairs];
  Two<float> by[kPairs];
  MGHF_UNROLL_ALL
  for (int j = 0; j < kPairs; ++j) {
    const int column = 8 * j + 2 * t;
    const auto at = static_cast<unsigned>(tile.begin + column);
    const auto line = static_cast<int>(at / columns);
    const int y = tile.row + line, z = tile.column + static_cast<int>(at) - line * tile.columns;
    offsets[j] = y * row_stride + z;
    by[j] = *reinterpret_cast<const Two<float>*>(backs + column);
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      exists[half][j] = column < tile.pixels && y < heights[half] && z < widths[half];
      pairs[half][j].set(0, 0);
      if (add && exists[half][j]) {
        pairs[half][j] = *reinterpret_cast<const PixelPair<T>*>(cells[half] + offsets[j]);
      }
    }
  }
  MGHF_UNROLL_ALL
  for (int j = 0; j < kPairs; ++j) {
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      PixelPair<T>& pair = pairs[half][j];
      pair.set(fmaf(sums[4 * j + 2 * half], by[j].first, pair.first()),
               fmaf(sums[4 * j + 2 * half + 1], by[j].second, pair.second()));
      if (exists[half][j]) *reinterpret_cast<PixelPair<T>*>(cells[half] + offsets[j]) = pair;
    }
  }
}

// Dynamic shared memory: the stages, then d_h of most_patches().
template <class T, int kParts>
__global__ void __launch_bounds__(kRowsThreads, 1)
    image_gradient_rows(MutableImage<T> x, Patches p, Regions regions, HiddenGradient hidden,
                        GradientWeights weights, bool add, int stages) {
  if (!kWarpgroupProducts) never();
  constexpr int kBytes = GradientWeights::stage_bytes(kParts), kSteps = GradientWeights::steps();
  constexpr int kWords = kParts * kWordsOfPart;
  __shared__ ImageControl control;
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  uint4* const rows = reinterpret_cast<uint4*>(memory + stages * kBytes);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int64_t first_cell = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t all_cells = p.maps * regions.cells();
  const PatchRange range(first_cell, p, regions);
  if (thread == 0) {
    for (int slot = 0; slot < stages; ++slot) {
      control.open[slot].begin(1);
      control.free[slot].begin(kGroups * kWarpgroup / kWarp);
    }
    control.patches.begin(1);
  }
  if (thread < kMostWords) control.zeros[thread] = {0, 0, 0, 0};
  publish_counters();
  if (warp >= kGroups * 4) {
    leave_registers<kFewRegisters>();
    if (warp == kGroups * 4 && lane == 0) {
      copy_for_gradient<kParts>(memory, stages, rows, control, range, hidden, weights);
    }
    return;
  }
  take_registers<kManyRegisters>();

  // The cell whose row this lane addresses when factors are loaded, and those of its sums.
  const int64_t last_cell = all_cells - 1;
  const int64_t loaded_cell = first_cell + warp * 16 + lane / 8 % 2 * 8 + lane % 8;
  const Cell loaded(smaller(loaded_cell, last_cell), p, regions);
  int64_t own_cells[2];
  T* cells[2];
  int heights[2], widths[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    const int64_t cell = first_cell + warp * 16 + lane / 4 + 8 * half;
    own_cells[half] = smaller(cell, last_cell);
    const Cell own(own_cells[half], p, regions);
    heights[half] = cell > last_cell ? 0 : static_cast<int>(x.height) - own.i * p.stride;
    widths[half] = static_cast<int>(x.width) - own.j * p.stride;
    cells[half] = x.map(own.map / p.channels, own.map % p.channels) +
                  static_cast<int64_t>(own.i) * p.stride * x.row_stride + own.j * p.stride;
  }

  int slot = 0, parity = 0;
  control.patches.wait(0);
  MGHF_UNROLL(1)
  for (int number = 0; number < regions.tiles; ++number) {
    const Tile tile(regions, number);
    float sums[kCellPixels / 2] = {};
    MGHF_UNROLL(1)
    for (int term = 0; term < tile.terms(); ++term) {
      const int s = term / tile.column_terms, t = term % tile.column_terms;
      const int64_t patch = loaded.before(s, t, p);
      const uint4* const row =
          patch < 0 ? control.zeros : rows + (patch - range.first) * kWords;
      Parts<kSteps, kParts> factor;
      MGHF_UNROLL_ALL
      for (int step = 0; step < kSteps; ++step) {
        MGHF_UNROLL_ALL
        for (int part = 0; part < kParts; ++part) {
          load_matrices(factor.of[part][step], row + word_at(patch, part, 2 * step + lane / 16));
        }
      }
      float back[2];
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        const int64_t own = Cell(own_cells[half], p, regions).before(s, t, p);
        back[half] = own < 0 ? 0.0f : hidden.back[own];
      }
      control.open[slot].wait(parity);
      float d[kCellPixels / 2] = {};
      multiply_steps<kCellPixels, kParts>(
          d, factor,
          SharedColumns(memory + slot * kBytes, core_bytes_along_depth(kCellPixels), kCoreBytes));
      wait_for_products<0>();
      __syncwarp();  // all have used the stage
      if (lane == 0) control.free[slot].arrive();
      if (++slot == stages) slot = 0, parity ^= 1;
      MGHF_UNROLL_ALL
      for (int n = 0; n < kCellPixels / 2; ++n) sums[n] = fmaf(d[n], back[n / 2 % 2], sums[n]);
    }
    finish_tile(sums, tile, weights.first_back + number * kCellPixels, cells, heights, widths,
                x.row_stride, add);
  }
}

}  // namespace

}  // namespace mghf::cuda
