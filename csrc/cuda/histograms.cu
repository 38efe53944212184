// Entropies of histograms; see histograms.h.
#include "histograms.h"

namespace mghf::cuda {

namespace {

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

template <class Result>
const char* entropies_of_counts(const Counts& counts, const Ranges& ranges, Result* result,
                                int64_t maps, int64_t channels, int64_t pixels, Stream stream) {
  return launch(entropies_of_maps<Result>, {maps, kSweepThreads}, stream, counts, ranges, result,
                channels, pixels);
}

template const char* entropies_of_counts(const Counts&, const Ranges&, float*, int64_t, int64_t,
                                         int64_t, Stream);
template const char* entropies_of_counts(const Counts&, const Ranges&, double*, int64_t, int64_t,
                                         int64_t, Stream);

}  // namespace mghf::cuda
