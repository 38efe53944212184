// Shared by kernels that sweep over the maps of an image, run by run; and the histograms of maps,
// whose kernels are in histograms_counts.h and histograms.cu.
//
//     bin(v) = min(floor((v - low) / (high - low) * bins), bins - 1)      p = counts / (H W)
//     entropy = -sum p ln p / ln(bins)
//
// Bins are computed as in the reference, every operation rounded to float32; counts are integers,
// so their order is free; sums are float64 in a fixed order, so that equal maps stay equal.
#pragma once

#include <math.h>

#include "image.h"

namespace mghf::cuda {

constexpr int kSweepThreads = 256;
constexpr int kSweepWarps = kSweepThreads / kWarp;

// The maps' pixels cut into runs of a multiple of 32, which depend on the shape alone.
struct Runs {
  int64_t number, size;

  __host__ __device__ Runs(int64_t pixels, int64_t wanted_size, int64_t most) {
    const int64_t wanted = (pixels + wanted_size - 1) / wanted_size;
    number = wanted < 1 ? 1 : wanted > most ? most : wanted;
    size = ((pixels + number - 1) / number + kWarp - 1) / kWarp * kWarp;
    number = size == 0 ? 1 : (pixels + size - 1) / size;
  }
  __device__ int64_t begin(int64_t run) const { return run * size; }
  __device__ int64_t end(int64_t run, int64_t pixels) const {
    return (run + 1) * size < pixels ? (run + 1) * size : pixels;
  }
};

// A block's place: a run of one map, or of the 32 maps from `channel` on, one for each lane of a
// warp.
struct RunPlace {
  int64_t b, channel, run;

  // In 32 bits, as all of a grid's numbers are: divisions of 64 take a hundred instructions.
  __device__ RunPlace(unsigned block, int64_t runs, int64_t channels, int channels_of_block) {
    const int64_t wanted = (channels + channels_of_block - 1) / channels_of_block;
    const auto groups = static_cast<unsigned>(wanted);
    const unsigned in_channel = block / groups, number = static_cast<unsigned>(runs);
    channel = static_cast<int64_t>(block % groups) * channels_of_block;
    run = in_channel % number;
    b = in_channel / number;
  }
};

// How many of `first`, first + step, ... are less than `end`. A loop that counts them is unrolled,
// and the loads of several turns go together; in one that adds up to `end` a sum might overflow.
__device__ __forceinline__ unsigned turns_to(unsigned end, unsigned first, unsigned step) {
  return first < end ? (end - first + step - 1) / step : 0;
}

// If one is a NaN, the other.
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// The range of a map from those of its parts, computed by each calling thread.
__device__ __forceinline__ float2 range_of(const float* lows, const float* highs, int64_t map,
                                           int64_t parts) {
  if (parts == 1) return {lows[map], highs[map]};
  float2 range{INFINITY, -INFINITY};
  for (int64_t part = 0; part < parts; ++part) {
    range.x = smaller(range.x, lows[map * parts + part]);
    range.y = larger(range.y, highs[map * parts + part]);
  }
  return range;
}

// Ranges of the maps of an image, each in `parts` contiguous parts.
struct Ranges {
  const float *lows, *highs;
  int64_t parts;

  __device__ float2 of(int64_t map) const { return range_of(lows, highs, map, parts); }
};

// Counts of all maps: a map's bins are contiguous or, where a pixel's channels are, a bin's counts
// of 32 maps.
struct Counts {
  int* data;
  int bins;
  bool by_maps;

  __host__ __device__ static int64_t number(int64_t batch, int64_t channels, int64_t bins,
                                            bool by_maps) {
    return batch * (by_maps ? channels : (channels + kWarp - 1) / kWarp * kWarp) * bins;
  }
  __device__ int* group(int64_t b, int64_t channel, int64_t channels) const {
    return data + (b * ((channels + kWarp - 1) / kWarp) + channel / kWarp) * bins * kWarp;
  }
  __device__ int of(int64_t map, int64_t channels, int bin) const {
    if (by_maps) return data[map * bins + bin];
    const int64_t channel = map % channels;
    return group(map / channels, channel, channels)[bin * kWarp + channel % kWarp];
  }
};

// An image whose maps are counted.
template <class T>
struct Histograms {
  Image<T> x;
  Ranges ranges;
  Counts counts;
  // For the blocks that end last, if they are to compute entropies: those of the maps, and for
  // every map, or 32 maps where a pixel's are contiguous, how many of its blocks have ended.
  double* entropies = nullptr;
  int* ended = nullptr;
};

// One or two images, whose blocks alternate. The last maps come first, because more of them are
// still in the second-level cache from the previous sweep.
template <class T>
struct Counted {
  Histograms<T> first, second;
  int images;

  // Number by number: chosen as a whole, its pointers would no longer be known to be to global
  // memory, nor itself to be among the parameters, and loads would be those of generic addresses.
  __device__ Histograms<T> of(unsigned block) const {
    const bool other = images == 2 && block % 2 == 1;
    const auto of_block = [&](auto a, auto b) { return other ? b : a; };
    Histograms<T> found = first;  // both have one shape and one layout of counts
    found.x.data = of_block(first.x.data, second.x.data);
    found.x.batch_stride = of_block(first.x.batch_stride, second.x.batch_stride);
    found.x.channel_stride = of_block(first.x.channel_stride, second.x.channel_stride);
    found.x.row_stride = of_block(first.x.row_stride, second.x.row_stride);
    found.x.column_stride = of_block(first.x.column_stride, second.x.column_stride);
    found.ranges.lows = of_block(first.ranges.lows, second.ranges.lows);
    found.ranges.highs = of_block(first.ranges.highs, second.ranges.highs);
    found.counts.data = of_block(first.counts.data, second.counts.data);
    found.entropies = of_block(first.entropies, second.entropies);
    found.ended = of_block(first.ended, second.ended);
    return found;
  }
  __device__ RunPlace place(unsigned block, int64_t runs, int channels_of_block) const {
    return {(gridDim.x - 1 - block) / static_cast<unsigned>(images), runs, first.x.channels,
            channels_of_block};
  }
};

// Entropies of all maps from their counts, in float32 or float64.
template <class Result>
const char* entropies_of_counts(const Counts& counts, const Ranges& ranges, Result* result,
                                int64_t maps, int64_t channels, int64_t pixels, Stream stream);

}  // namespace mghf::cuda

