// The entropies of a stack's maps, for the ops `entropy` and `content_style`.
#pragma once

#include <limits>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "../dispatch.h"
#include "../entropy.h"
#include "pixel_runs.h"

namespace mghf {

inline void check_bins(int64_t bins) {
  STD_TORCH_CHECK(bins >= 2 && bins <= int64_t{1} << 24, "bins is ", bins,
                  "; allowed is 2 to 2^24");
}

// Ranges of the maps of a stack that is stored pixel by pixel: padded_channels() lows and highs per
// image.
struct StackRanges {
  std::vector<float> low, high;
};

// Entropies of such a stack's maps in float64, (B, C).
inline void count_entropies(const EntropyKernels& kernels, const ImageView& x,
                            const StackRanges& ranges, int64_t bins, double* entropies) {
  const int64_t padded = kernels.padded_channels(x.channels), step = kernels.count_step(bins);
  const PixelRuns runs(x, 16384, 16);
  const Buffer<uint32_t> counts(x.batch * runs.count * padded * step);
  const auto counts_of = [&](int64_t b, int64_t run) {
    return counts.get() + (b * runs.count + run) * padded * step;
  };
  for_each(x.batch * runs.count, kernels.run_workspace_bytes(x), [&](int64_t i, void* workspace) {
    const int64_t b = i / runs.count, run = i % runs.count;
    kernels.run_counts(x, b, runs.begin(run), runs.size(run), ranges.low.data() + b * padded,
                       ranges.high.data() + b * padded, bins, counts_of(b, run), workspace);
  });
  for_each(x.batch * x.channels, 64, [&](int64_t i, void*) {
    const int64_t b = i / x.channels, c = i % x.channels;
    const float low = ranges.low[b * padded + c];
    entropies[i] = low != low ? std::numeric_limits<double>::quiet_NaN()
                              : kernels.entropy(counts_of(b, 0) + c * step, runs.count,
                                                padded * step, bins, runs.pixels);
  });
}

}  // namespace mghf
