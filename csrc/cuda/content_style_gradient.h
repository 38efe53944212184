// The coefficients of the backward, from which maps_gradient.h writes the gradient; see
// content_style.cu.
#pragma once

#include "content_style_selection.h"
#include "maps_gradient.h"

namespace mghf::cuda {

namespace {

// The coefficients of a map's gradient, and its place among the kept maps, or -1.
struct StyleTerm {
  float4 terms;  // naive, of_difference, of_centred, mean_of_centred
  float4 other;  // of_other, mean_of_other, alike, place, as bits

  __device__ int place() const { return bits_as<int>(other.w); }
  __device__ float gradient(float s, float g, float product) const {
    const float d = s - g, naive = terms.x * d;
    // Selected, not multiplied: a NaN of a kept map must not reach maps that are not kept.
    if (place() < 0) return naive;
    const float x = other.z != 0 ? d : g;
    return naive + (product + terms.y * d + terms.z * (s - terms.w) + other.x * (x - other.y));
  }
};

template <class T>
struct StyleTerms {
  static constexpr bool kReadsPair = true;
  Image<T> gt;
  const int *channels, *starts;  // of the kept maps, ascending; of each group
  const StyleTerm* terms;
  int maps;

  __device__ int kept(int64_t b, int i) const { return channels[b * maps + i]; }
  __device__ int kept_before(int64_t b, int group) const {
    return maps > 0 ? starts[b * (groups_of(gt.channels) + 1) + group] : 0;
  }
  __device__ StyleTerm of(int64_t b, int channel) const { return terms[b * gt.channels + channel]; }
};

// Finds the kept maps in ascending order, a block per image.
__global__ void __launch_bounds__(kSelectThreads)
    prepare(const int64_t* kept, int* ranks, Ascending ascending, int* places, int* starts,
            int64_t channels, int64_t maps) {
  __shared__ int counts[kSelectThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x, groups = groups_of(channels);
  ranks += b * channels;
  for (int64_t c = thread; c < channels; c += kSelectThreads) ranks[c] = static_cast<int>(maps);
  __syncthreads();
  for (int64_t i = thread; i < maps; i += kSelectThreads) {
    const int64_t c = kept[b * maps + i];
    if (c >= 0 && c < channels) ranks[c] = static_cast<int>(i);
  }
  __syncthreads();
  sort_kept(ranks, channels, maps, counts, [&](int64_t c, int place) {
    const bool is_kept = ranks[c] < maps;
    places[b * channels + c] = is_kept ? place : -1;
    if (is_kept) {
      ascending.channels[b * maps + place] = static_cast<int>(c);
      ascending.ranks[b * maps + place] = ranks[c];
    }
    if (c % kGroup == 0) starts[b * (groups + 1) + c / kGroup] = place;
    if (c == channels - 1) starts[b * (groups + 1) + groups] = place + is_kept;
  });
}

// Gram's part of the gradient is K S_kept with K_ij = (4 grad / (M^2 n)) w_i w_j D_ij. A block
// takes 16 of the rows of a group's kept maps; the first of them also the group's terms.
__global__ void __launch_bounds__(kGradientThreads)
    fragments_of_style(StyleGradients grads, StyleStatistics statistics, Ascending ascending,
                       const int* places, const int* starts, StyleTerm* terms, uint4* fragments,
                       int64_t channels, int64_t pixels) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t maps = statistics.top_m, groups = groups_of(channels);
  const int64_t tile = blockIdx.x % kRowTiles, group = blockIdx.x / kRowTiles % groups;
  const int64_t b = blockIdx.x / kRowTiles / groups;
  const auto grad = [&](int term) {
    return static_cast<double>(grads.data[term][b * grads.strides[term]]);
  };
  const auto m = static_cast<double>(maps > 0 ? maps : 1), n = static_cast<double>(pixels);
  const int64_t c = group * kGroup + thread;
  if (tile == 0 && thread < kGroup && c < channels) {
    const int place = maps > 0 ? places[b * channels + c] : -1;
    StyleTerm found{};
    found.terms.x = static_cast<float>(2 * grad(0) / (static_cast<double>(channels) * n));
    found.other.w = bits_as<float>(place);
    if (place >= 0) {
      const int64_t i = ascending.ranks[b * maps + place];
      const auto row = [&](int r) {
        return static_cast<double>(statistics.moments[(b * kStyleMoments + r) * maps + i]);
      };
      const double weight = statistics.weights[b * maps + i];
      const double correlation = grad(2) / (m * n);
      const bool alike = 2 * fabs(row(kExcess)) < row(kScale);
      found.terms.y = static_cast<float>(2 * grad(1) / (m * n) * weight * weight);
      found.terms.z = static_cast<float>(correlation * (alike ? -row(kExcess) : row(kSlope)));
      found.terms.w = static_cast<float>(row(kMeanS));
      found.other.x = static_cast<float>(correlation * (alike ? row(kScale) : -row(kScale)));
      found.other.y = static_cast<float>(alike ? row(kMeanD) : row(kMeanG));
      found.other.z = alike ? 1.0f : 0.0f;
    }
    terms[b * channels + c] = found;
  }
  if (maps == 0) return;
  const int* const start = starts + b * (groups + 1) + group;
  const int first = start[0] + static_cast<int>(tile) * 16, rows = start[1] - first;
  if (rows <= 0) return;
  const int* const ranks = ascending.ranks + b * maps;
  const float* const weights = statistics.weights + b * maps;
  const double gram = 4 * grad(3) / (m * m * n);
  write_fragments(
      fragments + ((b * groups + group) * kRowTiles + tile) * depths_of(maps) * kWarp * 2, rows,
      static_cast<int>(maps), [&](int row, int column) {
        const int64_t i = ranks[first + row], j = ranks[column];
        return static_cast<float>(
            gram * static_cast<double>(weights[i]) * static_cast<double>(weights[j]) *
            static_cast<double>(statistics.difference[(b * maps + i) * maps + j]));
      });
}

}  // namespace

}  // namespace mghf::cuda
