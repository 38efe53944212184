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

// The kept maps, most important first: compared in float32, ties to the lower channel, a NaN above
// all. Also their weights and moments, and the terms that need no product. A block per image; a
// map's rank is the number of maps before it.
__global__ void __launch_bounds__(kSelectThreads)
    select(const double* entropies, const double* statistics, float* compared,
           int* ranks, Ascending ascending, int* places, StyleResults results,
           StyleOptions options, int64_t batch, int64_t channels) {
  __shared__ double sums[3][kSelectThreads];
  __shared__ int counts[kSelectThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x, maps = options.top_m;
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
  sort_kept(ranks, channels, maps, counts, [&](int64_t c, int place) {
    if (ranks[c] >= maps) return;
    ascending.channels[b * maps + place] = static_cast<int>(c);
    places[b * maps + ranks[c]] = place;
  });
}

// ---- Gram's difference ----

constexpr int kDifferenceThreads = 512;

// difference_ij = w_i w_j (P_ij + P_ji) / (2 M n) and sum difference^2 / M, a block per image.
__global__ void __launch_bounds__(kDifferenceThreads)
    gram_difference(const double* totals, const int* places, const float* weights,
                    float* difference, float* gram, int64_t maps, int64_t pixels) {
  __shared__ double squares[kDifferenceThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x;
  totals += product_totals(b, maps, true);
  places += b * maps;
  weights += b * maps;
  const double share = 1 / (2 * static_cast<double>(maps) * static_cast<double>(pixels));
  double square = 0;
  MGHF_UNROLL(4)
  for (int64_t k = thread; k < maps * maps; k += kDifferenceThreads) {
    const int64_t i = k / maps, j = k % maps;
    const double sum = totals[place_of_total(maps, true, places[i], places[j])] +
                       totals[place_of_total(maps, true, places[j], places[i])];
    const double weight = static_cast<double>(weights[i]) * static_cast<double>(weights[j]);
    const double value = weight * sum * share;
    difference[b * maps * maps + k] = static_cast<float>(value);
    square += value * value;
  }
  squares[thread] = square;
  for (int half = kDifferenceThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) squares[thread] += squares[thread + half];
  }
  if (thread == 0) gram[b] = static_cast<float>(squares[0] / static_cast<double>(maps));
}

}  // namespace

}  // namespace mghf::cuda
