// Which maps are kept, and the difference of their Gram matrices; see content_style.cu.
#pragma once

#include "content_style_moments.h"

namespace mghf::cuda {

namespace {

// ---- selection ----

constexpr int kSelectThreads = 256;

// The channels and the ranks of an image's kept maps, ascending by channel.
struct Ascending {
  int *channels, *ranks;  // (B, M)
};

// A channel of an image is kept if its rank is less than `maps`. Calls `found(channel, place)` with
// the number of kept channels before each channel.
template <class Found>
__device__ void sort_kept(const int* ranks, int64_t channels, int64_t maps, int* counts_of_threads,
                          const Found& found) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = (channels + kSelectThreads - 1) / kSelectThreads;
  const int64_t begin = thread * share;
  const int64_t end = begin + share < channels ? begin + share : channels;
  int count = 0;
  MGHF_UNROLL(1)
  for (int64_t c = begin; c < end; ++c) count += ranks[c] < maps;
  counts_of_threads[thread] = count;
  __syncthreads();
  int place = 0;
  MGHF_UNROLL(4)
  for (int i = 0; i < thread; ++i) place += counts_of_threads[i];
  MGHF_UNROLL(1)
  for (int64_t c = begin; c < end; ++c) {
    found(c, place);
    place += ranks[c] < maps;
  }
}

struct Selection {
  const double *entropies, *statistics;  // of both images' maps, first G's; of the pair's maps
  float* compared;
  int* ranks;
  Ascending ascending;
  int* places;
  StyleResults results;
  StyleOptions options;
  int64_t batch, channels;
};

struct SelectionMemory {
  double sums[3][kSelectThreads];
  int counts[kSelectThreads];
};

// The kept maps of an image, most important first: compared in float32, ties to the lower channel,
// a NaN above all. Also their weights and moments, and the terms that need no product. By a block;
// a map's rank is the number of maps before it.
__device__ inline void select_maps(const Selection& selection, int64_t b, SelectionMemory& memory) {
  const auto& [entropies, statistics, all_compared, all_ranks, ascending, places, results, options,
               batch, channels] = selection;
  auto& sums = memory.sums;
  float* compared = all_compared;
  int* ranks = all_ranks;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t maps = options.top_m;
  const auto importance = [&](int64_t c) {
    return 1 - (entropies[b * channels + c] + entropies[(batch + b) * channels + c]) / 2;
  };
  compared += b * channels;
  ranks += b * channels;
  if (maps > 0) {
    for (int64_t c = thread; c < channels; c += kSelectThreads) {
      const auto rounded = static_cast<float>(importance(c));
      compared[c] = rounded == rounded ? rounded : INFINITY;
    }
    __syncthreads();
  }
  const double* const of_map = statistics + b * kStatistics * channels;
  double squares = 0, weighted = 0, distance = 0;
  for (int64_t c = thread; c < channels; c += kSelectThreads) {
    const double square = of_map[kSquare * channels + c];
    squares += square;
    if (maps == 0) continue;
    const float mine = compared[c];
    int rank = 0;
    MGHF_UNROLL(4)
    for (int other = 0; other < static_cast<int>(channels); ++other) {
      const float theirs = compared[other];
      rank += theirs > mine || (theirs == mine && other < c);
    }
    ranks[c] = rank;
    if (rank >= maps) continue;
    const double weight = pow(1 + options.alpha * importance(c), options.gamma);
    results.kept[b * maps + rank] = c;
    results.weights[b * maps + rank] = static_cast<float>(weight);
    for (int k = 0; k < kStyleMoments; ++k) {
      results.moments[(b * kStyleMoments + k) * maps + rank] =
          static_cast<float>(of_map[k * channels + c]);
    }
    weighted += weight * weight * square;
    distance += of_map[kDistance * channels + c];
  }
  sums[0][thread] = squares;
  sums[1][thread] = weighted;
  sums[2][thread] = distance;
  for (int half = kSelectThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (auto& sum : sums) sum[thread] += sum[thread + half];
    }
  }
  if (thread == 0) {
    const auto m = static_cast<double>(maps > 0 ? maps : 1);
    results.naive[b] = static_cast<float>(sums[0][0] / static_cast<double>(channels));
    results.mse[b] = static_cast<float>(sums[1][0] / m);
    results.correlation[b] = static_cast<float>(sums[2][0] / m);
    if (maps == 0) results.gram[b] = 0;
  }
  if (maps == 0) return;
  sort_kept(ranks, channels, maps, memory.counts, [&](int64_t c, int place) {
    if (ranks[c] >= maps) return;
    selection.ascending.channels[b * maps + place] = static_cast<int>(c);
    selection.places[b * maps + ranks[c]] = place;
  });
}

// A block per image, for terms without histograms.
__global__ void __launch_bounds__(kSelectThreads) select(Selection selection) {
  __shared__ SelectionMemory memory;
  select_maps(selection, blockIdx.x, memory);
}

// What the last blocks of the histograms do: that of a map, or of 32, its entropy, that of an image
// the selection.
struct EntropiesAndSelection {
  static constexpr bool kWanted = true;
  static constexpr size_t kSharedBytes = sizeof(SelectionMemory);
  static_assert(kSelectThreads == kSweepThreads);

  Selection selection;
  int* ended;             // (B): how many of an image's groups of maps are complete
  int64_t groups_of_image;  // of both stacks

  // A warp computes the entropy of a map.
  template <int kMaps, class T>
  __device__ void counted(const Histograms<T>& own, const RunPlace& place, int64_t runs,
                          void* shared) const {
    const int64_t channels = own.x.channels, pixels = own.x.pixels();
    const int64_t group =
        place.b * ((channels + kMaps - 1) / kMaps) + place.channel / kMaps;
    if (!is_last(own.ended + group, runs)) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int i = static_cast<int>(threadIdx.x) / kWarp; i < kMaps; i += kSweepWarps) {
      const int64_t map = place.b * channels + place.channel + i;
      if (place.channel + i >= channels) break;
      double sum = 0;
      for (int bin = lane; bin < own.counts.bins; bin += kWarp) {
        const int count = own.counts.of(map, channels, bin);
        const double p = static_cast<double>(count) / static_cast<double>(pixels);
        if (count > 0) sum -= p * log(p);
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(kAllLanes, sum, mask);
      }
      const float2 range = own.ranges.of(map);
      const float extent = range.y - range.x;
      const double entropy = sum / log(static_cast<double>(own.counts.bins));
      if (lane == 0) own.entropies[map] = extent - extent == 0 ? entropy : static_cast<double>(NAN);
    }
    if (!is_last(ended + place.b, groups_of_image)) return;
    select_maps(selection, place.b, *static_cast<SelectionMemory*>(shared));
  }
};

// ---- Gram's difference ----

// What the last block of an image's products does:
//
//     difference_ij = w_i w_j (P_ij + P_ji) / (2 M n)      and the term, sum difference^2 / M
struct GramDifference {
  static constexpr bool kWanted = true;

  const double* totals;
  const int* places;
  const float* weights;
  float *difference, *gram;
  int64_t maps, pixels;
  int* ended;  // (B): how many of an image's blocks have ended

  __device__ void added(int64_t tile, int64_t blocks_of_tile) const {
    const int64_t tiles = product_tiles(maps, true), b = tile / tiles;
    if (is_last(ended + b, tiles * blocks_of_tile)) subtract(b);
  }

  __device__ void subtract(int64_t b) const {
    __shared__ double squares[kProductThreads];
    const int thread = static_cast<int>(threadIdx.x);
    const double* const of_image = totals + product_totals(b, maps, true);
    const int* const place = places + b * maps;
    const float* const weight = weights + b * maps;
    const double share = 1 / (2 * static_cast<double>(maps) * static_cast<double>(pixels));
    double square = 0;
    MGHF_UNROLL(4)
    for (int64_t k = thread; k < maps * maps; k += kProductThreads) {
      const int64_t i = k / maps, j = k % maps;
      const double sum = of_image[place_of_total(maps, true, place[i], place[j])] +
                         of_image[place_of_total(maps, true, place[j], place[i])];
      const double both = static_cast<double>(weight[i]) * static_cast<double>(weight[j]);
      const double value = both * sum * share;
      difference[b * maps * maps + k] = static_cast<float>(value);
      square += value * value;
    }
    squares[thread] = square;
    for (int half = kProductThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (thread < half) squares[thread] += squares[thread + half];
    }
    if (thread == 0) gram[b] = static_cast<float>(squares[0] / static_cast<double>(maps));
  }
};

}  // namespace

}  // namespace mghf::cuda
