// Histogram entropies of feature maps; see histograms.h.
//
// Three kernels: the ranges of runs of pixels, the counts, the sums over the bins.
//
// Predicted floor for B = 1, C = 128, 512 x 512, float32: the maps read twice, 268 MB, 62 us at 4.3
// TB/s (from the second read on some of them come from the 50 MB of the second-level cache).
#include "entropy.h"

#include "histograms_counts.h"

namespace mghf::cuda {

namespace {

constexpr int64_t kPixelsOfRun = 16384;
constexpr int64_t kMostRuns = 64;

Runs runs_of(int64_t pixels) { return {pixels, kPixelsOfRun, kMostRuns}; }

// A NaN counts as infinity, so that the map's range is not finite.
__device__ __forceinline__ float or_infinity(float x) { return x == x ? x : INFINITY; }

template <class T, Reading kReading>
__global__ void __launch_bounds__(kSweepThreads)
    range_of_maps(Image<T> x, float* lows, float* highs, Runs runs) {
  __shared__ float low_of[kSweepWarps], high_of[kSweepWarps];
  constexpr int kStep = pixels_of(kReading);
  const RunPlace place(blockIdx.x, runs.number, x.channels, 1);
  const T* const map = x.map(place.b, place.channel);
  const int64_t end = runs.end(place.run, x.pixels());
  float low = INFINITY, high = -INFINITY;
  MGHF_UNROLL(4)
  for (int64_t p = runs.begin(place.run) + threadIdx.x * kStep; p < end;
       p += kSweepThreads * kStep) {
    float values[kStep];
    x.template read<kReading>(values, map, p);
    for (const float value : values) {
      low = smaller(low, or_infinity(value));
      high = larger(high, or_infinity(value));
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    low = smaller(low, __shfl_xor_sync(~0u, low, mask));
    high = larger(high, __shfl_xor_sync(~0u, high, mask));
  }
  if (threadIdx.x % kWarp == 0) {
    low_of[threadIdx.x / kWarp] = low;
    high_of[threadIdx.x / kWarp] = high;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kSweepWarps; ++i) {
      low = smaller(low, low_of[i]);
      high = larger(high, high_of[i]);
    }
    const int64_t at = (place.b * x.channels + place.channel) * runs.number + place.run;
    lows[at] = low;
    highs[at] = high;
  }
}

template <class T, Reading kReading>
__global__ void __launch_bounds__(kSweepThreads)
    range_of_pixels(Image<T> x, float* lows, float* highs, Runs runs) {
  __shared__ float low_of[kSweepWarps][kWarp], high_of[kSweepWarps][kWarp];
  const RunPlace place(blockIdx.x, runs.number, x.channels, kWarp);
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp;
  const int64_t channel = place.channel + lane;
  const int64_t end = runs.end(place.run, x.pixels());
  float low = INFINITY, high = -INFINITY;
  if (channel < x.channels) {
    const T* const map = x.map(place.b, channel);
    MGHF_UNROLL(4)
    for (int64_t p = runs.begin(place.run) + row; p < end; p += kSweepWarps) {
      const float value =
          or_infinity(to_float(map[x.template offset<kReading == Reading::flat>(p)]));
      low = smaller(low, value);
      high = larger(high, value);
    }
  }
  low_of[row][lane] = low;
  high_of[row][lane] = high;
  __syncthreads();
  if (row == 0 && channel < x.channels) {
    for (int i = 1; i < kSweepWarps; ++i) {
      low = smaller(low, low_of[i][lane]);
      high = larger(high, high_of[i][lane]);
    }
    const int64_t at = (place.b * x.channels + channel) * runs.number + place.run;
    lows[at] = low;
    highs[at] = high;
  }
}

__global__ void __launch_bounds__(kSweepThreads) clear(int* counts, int64_t number) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSweepThreads + threadIdx.x;
  if (i < number) counts[i] = 0;
}

template <class T, Reading kReading>
const char* run(const Image<T>& x, int64_t bins, float* result, void* workspace, Stream stream) {
  const int64_t maps = x.batch * x.channels;
  const Runs runs = runs_of(x.pixels());
  float* const lows = static_cast<float*>(workspace);
  float* const highs = lows + maps * runs.number;
  const Ranges ranges{lows, highs, runs.number};
  const Counts counts{reinterpret_cast<int*>(highs + maps * runs.number), static_cast<int>(bins),
                      x.by_maps()};
  const int64_t number = Counts::number(x.batch, x.channels, bins, counts.by_maps);
  const char* error = launch(clear, {(number + kSweepThreads - 1) / kSweepThreads, kSweepThreads},
                             stream, counts.data, number);
  if (error != nullptr) return error;
  const int64_t groups = counts.by_maps ? x.channels : (x.channels + kWarp - 1) / kWarp;
  error = launch(counts.by_maps ? range_of_maps<T, kReading> : range_of_pixels<T, kReading>,
                 {x.batch * groups * runs.number, kSweepThreads}, stream, x, lows, highs, runs);
  if (error != nullptr) return error;
  const Histograms<T> histograms{x, ranges, counts};
  error = count<kReading>(Counted<T>{histograms, histograms, 1}, runs, Nothing{}, stream);
  if (error != nullptr) return error;
  return entropies_of_counts(counts, ranges, result, maps, x.channels, x.pixels(), stream);
}

}  // namespace

int64_t entropy_workspace_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t bins) {
  return batch * channels * 2 * runs_of(pixels).number * static_cast<int64_t>(sizeof(float)) +
         Counts::number(batch, channels, bins, false) * static_cast<int64_t>(sizeof(int));
}

template <class T>
const char* entropy(const Image<T>& x, int64_t bins, float* result, void* workspace,
                    Stream stream) {
  if (!x.flat()) return run<T, Reading::strided>(x, bins, result, workspace, stream);
  if (!x.by_fours()) return run<T, Reading::flat>(x, bins, result, workspace, stream);
  return run<T, Reading::fours>(x, bins, result, workspace, stream);
}

template const char* entropy(const Image<float>&, int64_t, float*, void*, Stream);
template const char* entropy(const Image<Half>&, int64_t, float*, void*, Stream);
template const char* entropy(const Image<BFloat16>&, int64_t, float*, void*, Stream);

}  // namespace mghf::cuda
