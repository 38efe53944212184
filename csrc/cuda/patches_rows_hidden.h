// The gradient before the ReLU for patches_rows_image.h; see patches.cu.
#pragma once

#include "patches_image.h"
#include "patches_rows.h"

namespace mghf::cuda {

namespace {

constexpr int kCellPixels = 64;  // of a cell of the image, of a tile

// The weights of the gradient, likewise: W2 with units as columns, and W1 of 64 pixels of a cell as
// columns, for every tile and every patch that covers it (see patches_image.h), a stage each.
struct GradientWeights {
  uint4 *second, *first;
  float *second_back, *first_back;  // (kUnits), (tiles, kCellPixels)
  Regions regions;
  int stages;

  GradientWeights(const Projection& p, Pieces& pieces)
      : regions(p.patch_size, p.stride, p.patch_size, p.patch_size, kCellPixels), stages(0) {
    for (int tile = 0; tile < regions.tiles; ++tile) stages += Tile(regions, tile).terms();
    second = pieces.take<uint4>(second_bytes() / 16);
    first = pieces.take<uint4>(int64_t{stages} * stage_bytes() / 16);
    second_back = pieces.take<float>(kUnits);
    first_back = pieces.take<float>(int64_t{regions.tiles} * kCellPixels);
  }
  __host__ __device__ static constexpr int second_steps() { return kOutputs / kHalvesOfStep; }
  __host__ __device__ static constexpr int second_bytes(int parts = kMostParts) {
    return parts * second_steps() * step_bytes(kUnits);
  }
  __host__ __device__ static constexpr int steps() { return kUnits / kHalvesOfStep; }
  __host__ __device__ static constexpr int stage_bytes(int parts = kMostParts) {
    return parts * steps() * step_bytes(kCellPixels);
  }
  int64_t pack_blocks() const {
    return up(kUnits + int64_t{regions.tiles} * kCellPixels, kWarpsOfPack);
  }
};

__global__ void __launch_bounds__(kThreads)
    pack_halves_for_gradient(GradientWeights to, const float* weight1, const float* weight2,
                             int size, int stride, int hidden, int dimension) {
  const int column = warp_of_pack();
  if (column < kUnits) {
    pack_column_of(weight2, true, column, hidden, dimension, GradientWeights::second_steps(),
                   kUnits, true, to.second, to.second_back);
    return;
  }
  const int number = (column - kUnits) / kCellPixels, of_tile = (column - kUnits) % kCellPixels;
  if (number >= to.regions.tiles) return;
  const Tile tile(to.regions, number);
  int stage = 0;
  for (int before = 0; before < number; ++before) stage += Tile(to.regions, before).terms();
  const int at = tile.begin + of_tile, row = tile.row + at / tile.columns;
  const int pixel = row * size + tile.column + at % tile.columns;
  const auto weight_of = [&](int term, int unit) {
    const int offset = (term / tile.column_terms * size + term % tile.column_terms) * stride;
    return of_tile < tile.pixels && unit < hidden
               ? weight1[static_cast<int64_t>(unit) * size * size + pixel + offset]
               : 0.0f;
  };
  // One power for all terms, which are added up.
  float largest = 0;
  for (int term = 0; term < tile.terms(); ++term) {
    largest = fmaxf(largest,
                    largest_of_column(hidden, [&](int unit) { return weight_of(term, unit); }));
  }
  const PowerOfTwo power(largest * kRoomForSums);
  if (threadIdx.x % kWarp == 0) to.first_back[number * kCellPixels + of_tile] = power.back;
  for (int term = 0; term < tile.terms(); ++term) {
    const int64_t words = GradientWeights::stage_bytes() / 16;
    pack_column(power, of_tile, GradientWeights::steps(), kCellPixels, false,
                to.first + (stage + term) * words,
                [&](int unit) { return weight_of(term, unit); });
  }
}

// d_h of all patches: [patch][part][8 units], 16 bytes each, with as many parts as products take,
// and what undoes the patch's power of two. A patch's words of 16 bytes are in one of eight orders,
// by its number, so that the same word of neighbouring patches is in different banks of shared
// memory.
constexpr int kWordsOfPart = kUnits / 8;
constexpr int kMostWords = kMostParts * kWordsOfPart;  // of a patch

struct HiddenGradient {
  uint4* words;
  float* back;

  HiddenGradient(int64_t patches, Pieces& pieces)
      : words(pieces.take<uint4>(patches * kMostWords)), back(pieces.take<float>(patches)) {}
};
__host__ __device__ __forceinline__ int word_at(int64_t patch, int part, int word) {
  return part * kWordsOfPart + (word ^ static_cast<int>(patch & 7));
}

constexpr int kHiddenThreads = kGroups * kWarpgroup;

// A block takes 128 patches, a thread's share of two patches' d_y is computed in registers and is a
// factor at once. Predicted as for `hidden_gradient`: reads 30 MB, writes 29 MB, 14 us.
template <int kParts>
__global__ void __launch_bounds__(kHiddenThreads, 1)
    hidden_gradient_rows(Patches p, EmbeddingGradient gradient, GradientWeights weights,
                         HiddenGradient to) {
  if (!kWarpgroupProducts) never();
  constexpr int kSteps = GradientWeights::second_steps();
  __shared__ Counter there;
  alignas(16) __shared__ float backs[kUnits];
  MGHF_DYNAMIC_SHARED(unsigned char, second);
  const int thread = static_cast<int>(threadIdx.x), t = thread % 4;
  if (thread == 0) there.begin(1);
  publish_counters();
  if (thread == 0) {
    there.arrive(GradientWeights::second_bytes(kParts) + static_cast<int>(sizeof(backs)));
    copy_bulk(backs, weights.second_back, static_cast<int>(sizeof(backs)), there);
    copy_bulk(second, weights.second, GradientWeights::second_bytes(kParts), there);
  }
  RowFactor<kSteps, kParts> factor;
  int64_t patches[2], state_places[2];
  bool exists[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    const int row_of_block = thread / kWarp * 16 + thread % kWarp / 4 + 8 * half;
    const int64_t own = static_cast<int64_t>(blockIdx.x) * kRows + row_of_block;
    exists[half] = own < p.number();
    patches[half] = exists[half] ? own : 0;
    const Row row(patches[half], p.maps, p.of_map(), false);
    state_places[half] = row.item * p.state_words() * gradient.state_step + row.map;
    const float norm = bits_as<float>(gradient.state[state_places[half]]);
    const float* const grad =
        gradient.grad + row.map * gradient.map_stride + row.item * gradient.patch_stride;
    const float* const embedding = gradient.embedding + patches[half] * p.dimension;
    float values[kSteps][4], e[kSteps][4], along = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < 4 * kSteps; ++n) {
      const int d = n / 4 * kHalvesOfStep + 4 * t + n % 4;
      values[n / 4][n % 4] = d < p.dimension ? grad[d * gradient.dimension_stride] : 0.0f;
      e[n / 4][n % 4] = d < p.dimension ? embedding[d] : 0.0f;
      along += values[n / 4][n % 4] * e[n / 4][n % 4];
    }
    along += __shfl_xor_sync(kAllLanes, along, 1);
    along += __shfl_xor_sync(kAllLanes, along, 2);
    // At y = 0 the embedding is 0 as well; the smallest normal number only prevents 0/0.
    const float least = norm < kTiny ? kTiny : norm;
    along *= (least + kNormFloor) / least;
    const float by = 1 / (norm + kNormFloor);
    MGHF_UNROLL_ALL
    for (int n = 0; n < 4 * kSteps; ++n) {
      values[n / 4][n % 4] = (values[n / 4][n % 4] - e[n / 4][n % 4] * along) * by;
    }
    factor.split(values, half);
  }
  there.wait(0);
  float sums[kUnits / 2] = {};
  multiply_steps<kUnits, kParts>(
      sums, factor.parts,
      SharedColumns(second, core_bytes_along_depth(kUnits), kCoreBytes));
  wait_for_products<0>();

  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    unsigned bits[kUnits / 32];
    MGHF_UNROLL_ALL
    for (int word = 0; word < kUnits / 32; ++word) {
      bits[word] = 1 + word < p.state_words()
                       ? static_cast<unsigned>(
                             gradient.state[state_places[half] + (1 + word) * gradient.state_step])
                       : 0;
    }
    float largest = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < kUnits / 4; ++n) {
      const int unit = n / 2 * 8 + 2 * t + n % 2;
      const float positive = bits[n / 8] >> unit % 32 & 1 ? 1.0f : 0.0f;
      float& own = sums[n / 2 * 4 + half * 2 + n % 2];
      // Products and not a selection: a NaN must stay one.
      own = unit < p.hidden ? own * factor.back[half] * backs[unit] * positive : 0.0f;
      largest = fmaxf(largest, fabsf(own));
    }
    const PowerOfTwo power(largest_of_row(largest));
    if (!exists[half]) continue;
    uint4* const words = to.words + patches[half] * (kParts * kWordsOfPart);
    MGHF_UNROLL_ALL
    for (int j = 0; j < kUnits / 8; ++j) {
      const float* const two = sums + 4 * j + 2 * half;
      const SplitHalves split(two[0] * power.by, two[1] * power.by);
      reinterpret_cast<uint32_t*>(words + word_at(patches[half], 0, j))[t] = split.big;
      if constexpr (kParts == 2) {
        reinterpret_cast<uint32_t*>(words + word_at(patches[half], 1, j))[t] = split.small;
      }
    }
    if (t == 0) to.back[patches[half]] = power.back;
  }
}

}  // namespace

}  // namespace mghf::cuda
