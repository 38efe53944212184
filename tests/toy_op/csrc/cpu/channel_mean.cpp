// Means of feature maps, on the CPU. See mghf_fast/reference/channel_mean.py.
//
// Method. A map is read in runs and summed in float64, in the order of its pixels, so the sum does
// not depend on the number of threads, which take a map each.

#include "channel_mean.h"

#include "arena.h"
#include "tiles.h"

namespace mghf {
namespace {

constexpr int64_t kRunPixels = 4096;  // of one map, at a time

size_t workspace_bytes() {
  Arena arena{nullptr};
  arena.floats(kRunPixels);
  return arena.used;
}

double map_sum(const ImageView& view, int64_t b, int64_t channel, void* workspace) {
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(kRunPixels);
  const int64_t pixels = v.height * v.width;
  double sum = 0;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    const int64_t count = pixels - first < kRunPixels ? pixels - first : kRunPixels;
    const float* x = map_run(v, b, channel, first, count, buffer);
    for (int64_t p = 0; p < count; ++p) sum += static_cast<double>(x[p]);
  }
  return sum;
}

void fill_map(const MutableImageView& view, int64_t b, int64_t channel, float value,
              void* workspace) {
  const MutableImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(kRunPixels);
  for (int64_t p = 0; p < kRunPixels; ++p) buffer[p] = value;
  const int64_t pixels = v.height * v.width;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    const int64_t count = pixels - first < kRunPixels ? pixels - first : kRunPixels;
    for_each_run(v, first, count, [&](int64_t y, int64_t x, int64_t length, int64_t) {
      write_pixels(v, b, y, x, length, channel, 1, buffer, 1);
    });
  }
}

}  // namespace

const ChannelMeanKernels MGHF_KERNELS = {workspace_bytes, map_sum, fill_map};

}  // namespace mghf
