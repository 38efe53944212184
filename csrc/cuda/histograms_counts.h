// The kernels that count the values of maps; see histograms.h.
#pragma once

#include "histograms.h"
#include "last_block.h"

namespace mghf::cuda {

namespace {

// Up to this many bins a block counts in shared memory, beyond in device memory.
constexpr int64_t kSharedCounters = 8192;

// Bins of the values of a map. All divisions are by the same extent, so two multiply-adds correct
// the product with its reciprocal to the correctly rounded quotient (Markstein's theorem). Tiny and
// huge extents are scaled by a power of two, so that no underflow can change a bin.
struct Binning {
  float low, scale, extent, inverse;
  int bins;

  __device__ Binning(float2 range, int bins) : low(range.x), scale(1), bins(bins) {
    extent = range.y - range.x;
    if (extent < 0x1p-80f) scale = 0x1p80f;
    if (extent > 0x1p80f) scale = 0x1p-80f;
    extent *= scale;
    inverse = 1 / extent;
  }

  // A value without a bin (0 / 0 in a constant map, a NaN) is put into the first.
  // kFew: there are less than 2^23 bins.
  template <bool kFew>
  __device__ __forceinline__ int of(float value) const {
    const float from_low = (value - low) * scale;
    const float share = from_low * inverse;
    const float quotient = fmaf(fmaf(-share, extent, from_low), inverse, share);
    const float position = quotient * static_cast<float>(bins);
    const float bin = smaller(larger(position, 0), static_cast<float>(bins - 1));
#ifdef __CUDA_ARCH__
    // Rounded towards zero, the sum has the bin in its lower bits; a conversion takes the time of
    // eight additions.
    if (kFew) return bits_as<int>(__fadd_rz(bin, 0x1p23f)) - bits_as<int>(0x1p23f);
#endif
    return static_cast<int>(bin);
  }
};

// kShared: a histogram for each of `copies` groups of warps, which reduces collisions.
template <class T, Reading kReading, bool kShared, class Then>
__global__ void __launch_bounds__(kSweepThreads)
    counts_of_maps(Counted<T> counted, int copies, Runs runs, Then then) {
  MGHF_DYNAMIC_SHARED(int, histograms);
  constexpr int kStep = pixels_of(kReading);
  const auto [x, ranges, counts, entropies, ended] = counted.of(blockIdx.x);
  const int bins = counts.bins;
  const RunPlace place = counted.place(blockIdx.x, runs.number, 1);
  const int64_t map_index = place.b * x.channels + place.channel;
  int* const target = counts.data + map_index * bins;
  if (kShared) {
    for (int i = threadIdx.x; i < bins * copies; i += kSweepThreads) histograms[i] = 0;
    __syncthreads();
  }
  int* const own = kShared ? histograms + threadIdx.x / kWarp % copies * bins : target;
  const Binning binning(ranges.of(map_index), bins);
  const T* const map = x.map(place.b, place.channel);
  const unsigned first = static_cast<unsigned>(runs.begin(place.run)) + threadIdx.x * kStep;
  const auto end = static_cast<unsigned>(runs.end(place.run, x.pixels()));
  const unsigned turns = turns_to(end, first, kSweepThreads * kStep);
  MGHF_UNROLL(4)
  for (unsigned turn = 0; turn < turns; ++turn) {
    const unsigned p = first + turn * (kSweepThreads * kStep);
    float values[kStep];
    x.template read<kReading>(values, map, p);
    for (const float value : values) atomicAdd(own + binning.of<kShared>(value), 1);
  }
  if (kShared) {
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += kSweepThreads) {
      int count = 0;
      for (int copy = 0; copy < copies; ++copy) count += histograms[copy * bins + i];
      if (count > 0) atomicAdd(target + i, count);
    }
  }
  if constexpr (Then::kWanted) {
    // Found again, because kept they would cost registers.
    const unsigned block = opaque(blockIdx.x);
    then.template counted<1>(counted.of(block), counted.place(block, runs.number, 1), runs.number,
                             histograms);
  }
}

// Every lane of a warp has its own map and histogram, laid out [bin][lane], so there are no bank
// conflicts.
template <class T, Reading kReading, bool kShared, class Then>
__global__ void __launch_bounds__(kSweepThreads)
    counts_of_pixels(Counted<T> counted, Runs runs, Then then) {
  MGHF_DYNAMIC_SHARED(int, histograms);
  const auto [x, ranges, counts, entropies, ended] = counted.of(blockIdx.x);
  const int bins = counts.bins;
  const RunPlace place = counted.place(blockIdx.x, runs.number, kWarp);
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t channel = place.channel + lane;
  int* const target = counts.group(place.b, place.channel, x.channels);
  if (kShared) {
    for (int i = threadIdx.x; i < bins * kWarp; i += kSweepThreads) histograms[i] = 0;
    __syncthreads();
  }
  if (channel < x.channels) {
    int* const own = (kShared ? histograms : target) + lane;
    const Binning binning(ranges.of(place.b * x.channels + channel), bins);
    const T* const map = x.map(place.b, channel);
    const unsigned first = static_cast<unsigned>(runs.begin(place.run)) + row;
    const auto end = static_cast<unsigned>(runs.end(place.run, x.pixels()));
    const unsigned turns = turns_to(end, first, kSweepWarps);
    MGHF_UNROLL(4)
    for (unsigned turn = 0; turn < turns; ++turn) {
      const unsigned p = first + turn * kSweepWarps;
      float values[1];
      x.template read<kReading>(values, map, p);
      atomicAdd(own + binning.of<kShared>(values[0]) * kWarp, 1);
    }
  }
  if (kShared) {
    __syncthreads();
    for (int i = threadIdx.x; i < bins * kWarp; i += kSweepThreads) {
      if (histograms[i] > 0) atomicAdd(target + i, histograms[i]);
    }
  }
  if constexpr (Then::kWanted) {
    const unsigned block = opaque(blockIdx.x);  // likewise
    then.template counted<kWarp>(counted.of(block), counted.place(block, runs.number, kWarp),
                                 runs.number, histograms);
  }
}

}  // namespace

// Adds to the counts those of one image, or of two with the same shape and layout of counts. With
// `Then` a block whose counts are added calls its `counted`, with dynamic shared memory of at least
// Then::kSharedBytes.
template <Reading kReading, class T, class Then>
const char* count(const Counted<T>& counted, const Runs& runs, const Then& then, Stream stream) {
  size_t least = 0;
  if constexpr (Then::kWanted) least = Then::kSharedBytes;
  const auto shared = [&](int64_t counters) {
    const size_t bytes = static_cast<size_t>(counters) * sizeof(int);
    return bytes > least ? bytes : least;
  };
  const Image<T>& x = counted.first.x;
  const int64_t bins = counted.first.counts.bins;
  if (counted.first.counts.by_maps) {
    const int64_t blocks = counted.images * x.batch * x.channels * runs.number;
    const int64_t fitting = kSharedCounters / bins;
    const int copies = static_cast<int>(fitting < kSweepWarps ? fitting : kSweepWarps);
    const Grid grid{blocks, kSweepThreads, shared(copies * bins)};
    return copies > 0 ? launch(counts_of_maps<T, kReading, true, Then>, grid, stream, counted,
                               copies, runs, then)
                      : launch(counts_of_maps<T, kReading, false, Then>, grid, stream, counted, 1,
                               runs, then);
  }
  if constexpr (pixels_of(kReading) == 1) {
    const int64_t groups = (x.channels + kWarp - 1) / kWarp;
    const int64_t blocks = counted.images * x.batch * groups * runs.number;
    const bool fits = bins * kWarp <= kSharedCounters;
    const Grid grid{blocks, kSweepThreads, shared(fits ? bins * kWarp : 0)};
    return fits ? launch(counts_of_pixels<T, kReading, true, Then>, grid, stream, counted, runs,
                         then)
                : launch(counts_of_pixels<T, kReading, false, Then>, grid, stream, counted, runs,
                         then);
  }
  return "pixels of maps side by side are not counted by fours";
}

}  // namespace mghf::cuda
