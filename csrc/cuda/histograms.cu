// The histograms of maps, and entropies of them; see histograms.h.
#include "histograms.h"

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
  __device__ __forceinline__ int of(float value) const {
    const float from_low = (value - low) * scale;
    const float share = from_low * inverse;
    const float quotient = fmaf(fmaf(-share, extent, from_low), inverse, share);
    const float position = quotient * static_cast<float>(bins);
    const float most = static_cast<float>(bins - 1);
    return !(position > 0) ? 0 : position > most ? bins - 1 : static_cast<int>(position);
  }
};

// kShared: a histogram for each of `copies` groups of warps, which reduces collisions.
template <class T, Reading kReading, bool kShared>
__global__ void __launch_bounds__(kSweepThreads)
    counts_of_maps(Counted<T> counted, int copies, Runs runs) {
  MGHF_DYNAMIC_SHARED(int, histograms);
  constexpr int kStep = pixels_of(kReading);
  const auto [x, ranges, counts] = counted.own();
  const int bins = counts.bins;
  const RunPlace place(counted.block(), runs.number, x.channels, 1);
  const int64_t map_index = place.b * x.channels + place.channel;
  int* const target = counts.data + map_index * bins;
  if (kShared) {
    for (int i = threadIdx.x; i < bins * copies; i += kSweepThreads) histograms[i] = 0;
    __syncthreads();
  }
  int* const own = kShared ? histograms + threadIdx.x / kWarp % copies * bins : target;
  const Binning binning(ranges.of(map_index), bins);
  const T* const map = x.map(place.b, place.channel);
  const int64_t end = runs.end(place.run, x.pixels());
  MGHF_UNROLL(4)
  for (int64_t p = runs.begin(place.run) + threadIdx.x * kStep; p < end;
       p += kSweepThreads * kStep) {
    float values[kStep];
    x.template read<kReading>(values, map, p);
    for (const float value : values) atomicAdd(own + binning.of(value), 1);
  }
  if (kShared) {
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += kSweepThreads) {
      int count = 0;
      for (int copy = 0; copy < copies; ++copy) count += histograms[copy * bins + i];
      if (count > 0) atomicAdd(target + i, count);
    }
  }
}

// Every lane of a warp has its own map and histogram, laid out [bin][lane], so there are no bank
// conflicts.
template <class T, Reading kReading, bool kShared>
__global__ void __launch_bounds__(kSweepThreads)
    counts_of_pixels(Counted<T> counted, Runs runs) {
  MGHF_DYNAMIC_SHARED(int, histograms);
  const auto [x, ranges, counts] = counted.own();
  const int bins = counts.bins;
  const RunPlace place(counted.block(), runs.number, x.channels, kWarp);
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
    const int64_t end = runs.end(place.run, x.pixels());
    MGHF_UNROLL(4)
    for (int64_t p = runs.begin(place.run) + row; p < end; p += kSweepWarps) {
      float values[1];
      x.template read<kReading>(values, map, p);
      atomicAdd(own + binning.of(values[0]) * kWarp, 1);
    }
  }
  if (kShared) {
    __syncthreads();
    for (int i = threadIdx.x; i < bins * kWarp; i += kSweepThreads) {
      if (histograms[i] > 0) atomicAdd(target + i, histograms[i]);
    }
  }
}

// A block per map.
template <class Result>
__global__ void __launch_bounds__(kSweepThreads)
    entropies_of_maps(Counts counts, Ranges ranges, Result* result, int64_t channels,
                        int64_t pixels) {
  __shared__ double sums[kSweepThreads];
  const int64_t map = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  double sum = 0;
  for (int i = thread; i < counts.bins; i += kSweepThreads) {
    const int count = counts.of(map, channels, i);
    const double p = static_cast<double>(count) / static_cast<double>(pixels);
    if (count > 0) sum -= p * log(p);
  }
  sums[thread] = sum;
  for (int half = kSweepThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  if (thread == 0) {
    const float2 range = ranges.of(map);
    const float extent = range.y - range.x;
    const double entropy = sums[0] / log(static_cast<double>(counts.bins));
    result[map] = extent - extent == 0 ? static_cast<Result>(entropy) : static_cast<Result>(NAN);
  }
}

}  // namespace

template <Reading kReading, class T>
const char* count(const Counted<T>& counted, const Runs& runs, Stream stream) {
  const Image<T>& x = counted.first.x;
  const int64_t bins = counted.first.counts.bins;
  if (counted.first.counts.by_maps) {
    const int64_t blocks = counted.images * x.batch * x.channels * runs.number;
    const int64_t fitting = kSharedCounters / bins;
    const int copies = static_cast<int>(fitting < kSweepWarps ? fitting : kSweepWarps);
    const size_t bytes = static_cast<size_t>(copies * bins) * sizeof(int);
    return copies > 0 ? launch(counts_of_maps<T, kReading, true>, {blocks, kSweepThreads, bytes},
                               stream, counted, copies, runs)
                      : launch(counts_of_maps<T, kReading, false>, {blocks, kSweepThreads}, stream,
                               counted, 1, runs);
  }
  if constexpr (pixels_of(kReading) == 1) {
    const int64_t groups = (x.channels + kWarp - 1) / kWarp;
    const int64_t blocks = counted.images * x.batch * groups * runs.number;
    const size_t bytes = static_cast<size_t>(bins * kWarp) * sizeof(int);
    return bins * kWarp <= kSharedCounters
               ? launch(counts_of_pixels<T, kReading, true>, {blocks, kSweepThreads, bytes},
                        stream, counted, runs)
               : launch(counts_of_pixels<T, kReading, false>, {blocks, kSweepThreads}, stream,
                        counted, runs);
  }
  return "pixels of maps side by side are not counted by fours";
}

template <class Result>
const char* entropies_of_counts(const Counts& counts, const Ranges& ranges, Result* result,
                                int64_t maps, int64_t channels, int64_t pixels, Stream stream) {
  return launch(entropies_of_maps<Result>, {maps, kSweepThreads}, stream, counts, ranges, result,
                channels, pixels);
}

#define MGHF_COUNT(T)                                                                            \
  template const char* count<Reading::strided>(const Counted<T>&, const Runs&, Stream);          \
  template const char* count<Reading::flat>(const Counted<T>&, const Runs&, Stream);             \
  template const char* count<Reading::fours>(const Counted<T>&, const Runs&, Stream);
MGHF_COUNT(float)
MGHF_COUNT(Half)
MGHF_COUNT(BFloat16)
#undef MGHF_COUNT
template const char* entropies_of_counts(const Counts&, const Ranges&, float*, int64_t, int64_t,
                                         int64_t, Stream);
template const char* entropies_of_counts(const Counts&, const Ranges&, double*, int64_t, int64_t,
                                         int64_t, Stream);

}  // namespace mghf::cuda
