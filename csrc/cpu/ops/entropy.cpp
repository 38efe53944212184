// The op `entropy` on the CPU: argument checks and the calls of its kernels.

#include "arguments.h"
#include "histograms.h"

namespace {

using mghf::ImageView;
using mghf::Tensor;

mghf::StackRanges ranges_of(const mghf::EntropyKernels& kernels, const ImageView& x) {
  const int64_t padded = kernels.padded_channels(x.channels);
  const mghf::PixelRuns runs(x, 8192, 64);
  const auto size = x.batch * runs.count * padded;
  const mghf::Buffer<float> low(size), high(size);
  mghf::for_each(x.batch * runs.count, kernels.run_workspace_bytes(x),
                 [&](int64_t i, void* workspace) {
                   const int64_t run = i % runs.count;
                   kernels.run_range(x, i / runs.count, runs.begin(run), runs.size(run),
                                     low.get() + i * padded, high.get() + i * padded, workspace);
                 });
  const auto stack = static_cast<size_t>(x.batch * padded);
  mghf::StackRanges ranges{std::vector<float>(stack), std::vector<float>(stack)};
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t c = 0; c < padded; ++c) {
      float lowest = low.get()[b * runs.count * padded + c];
      float highest = high.get()[b * runs.count * padded + c];
      for (int64_t run = 1; run < runs.count; ++run) {
        const int64_t i = (b * runs.count + run) * padded + c;
        // The sum is NaN if one of them is.
        lowest = low.get()[i] < lowest ? low.get()[i] : lowest + 0 * low.get()[i];
        highest = high.get()[i] > highest ? high.get()[i] : highest + 0 * high.get()[i];
      }
      const float range = highest - lowest;
      if (!(range - range == 0)) lowest = highest = std::numeric_limits<float>::quiet_NaN();
      ranges.low[b * padded + c] = lowest;
      ranges.high[b * padded + c] = highest;
    }
  }
  return ranges;
}

Tensor entropy(const Tensor& features, int64_t bins) {
  const ImageView x = mghf::read_view(features, "x");
  mghf::check_bins(bins);
  STD_TORCH_CHECK(x.height * x.width < int64_t{1} << 32, "x has shape ", mghf::shape_of(features),
                  "; allowed are maps of less than 2^32 pixels");
  const auto& kernels = MGHF_KERNELS_OF(entropy);
  const int64_t shape[] = {x.batch, x.channels};
  Tensor result = mghf::new_tensor(features, shape, mghf::ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  const int64_t maps = x.batch * x.channels;
  if (x.height * x.width == 0) {
    std::fill_n(out, maps, std::numeric_limits<float>::quiet_NaN());
  } else if (kernels.by_maps(x, bins)) {
    mghf::for_each(maps, kernels.map_workspace_bytes(bins), [&](int64_t i, void* workspace) {
      const int64_t b = i / x.channels, c = i % x.channels;
      float low, high;
      kernels.map_range(x, b, c, &low, &high, workspace);
      out[i] = static_cast<float>(kernels.map_entropy(x, b, c, low, high, bins, workspace));
    });
  } else if (maps > 0) {
    std::vector<double> entropies(maps);
    mghf::count_entropies(kernels, x, ranges_of(kernels, x), bins, entropies.data());
    std::copy(entropies.begin(), entropies.end(), out);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) { m.impl("entropy", TORCH_BOX(&entropy)); }
