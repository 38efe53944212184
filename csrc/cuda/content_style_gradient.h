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

// Gram's part of the gradient is K S_kept with K_ij = (4 grad / (M^2 n)) w_i w_j D_ij. A block
// takes 16 of the rows of a group's kept maps; the first of them also the group's terms. Each finds
// the order of the kept maps itself, from how many precede each; an image's first block stores it.
// `whole`: K is not divided into groups; those of the first have its rows, up to 64.
__global__ void __launch_bounds__(kGradientThreads)
    fragments_of_style(StyleGradients grads, StyleStatistics statistics, int* kept_channels,
                       int* ranks_of_blocks, int* starts, StyleTerm* terms, uint4* fragments,
                       int64_t channels, int64_t pixels, bool whole) {
  __shared__ int before[2];        // kept maps before this group, and before the next
  __shared__ int places[kGroup];   // of the group's channels, or -1
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t maps = statistics.top_m, groups = groups_of(channels);
  const int64_t tile = blockIdx.x % kRowTiles, group = blockIdx.x / kRowTiles % groups;
  const int64_t b = blockIdx.x / kRowTiles / groups;
  int* const ranks = ranks_of_blocks + blockIdx.x * maps;
  const int64_t* const kept = statistics.kept + b * maps;
  if (thread < kGroup) places[thread] = -1;
  if (thread < 2) before[thread] = 0;
  __syncthreads();
  for (int64_t i = thread; i < maps; i += kGradientThreads) {
    const int64_t c = kept[i], in_group = c - group * kGroup;
    int place = 0;
    MGHF_UNROLL(4)
    for (int64_t j = 0; j < maps; ++j) place += kept[j] < c;
    ranks[place] = static_cast<int>(i);
    if (group == 0 && tile == 0) kept_channels[b * maps + place] = static_cast<int>(c);
    if (in_group < 0) atomicAdd(before, 1);
    if (in_group < kGroup) atomicAdd(before + 1, 1);
    if (in_group >= 0 && in_group < kGroup) places[in_group] = place;
  }
  __syncthreads();
  const auto grad = [&](int term) {
    return static_cast<double>(grads.data[term][b * grads.strides[term]]);
  };
  const auto m = static_cast<double>(maps > 0 ? maps : 1), n = static_cast<double>(pixels);
  const int64_t c = group * kGroup + thread;
  // A group's end is the next one's start, which that group writes.
  if (tile == 0 && (thread == 0 || (thread == 1 && group == groups - 1))) {
    starts[b * (groups + 1) + group + thread] = before[thread];
  }
  if (tile == 0 && thread < kGroup && c < channels) {
    const int place = places[thread];
    StyleTerm found{};
    found.terms.x = static_cast<float>(2 * grad(0) / (static_cast<double>(channels) * n));
    found.other.w = bits_as<float>(place);
    if (place >= 0) {
      const int64_t i = ranks[place];
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
  if (whole && group > 0) return;
  const int first = (whole ? 0 : before[0]) + static_cast<int>(tile) * 16;
  const int rows = (whole ? static_cast<int>(maps) : before[1]) - first;
  if (rows <= 0) return;
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
