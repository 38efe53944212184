// The interface between the op `channel_mean` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

// Kernels work on one map, with a caller's scratch memory, 64-byte aligned.
struct ChannelMeanKernels {
  size_t (*workspace_bytes)();
  double (*map_sum)(const ImageView&, int64_t b, int64_t channel, void* workspace);
  // Sets every pixel of the map to a value.
  void (*fill_map)(const MutableImageView&, int64_t b, int64_t channel, float value,
                   void* workspace);
};

extern const ChannelMeanKernels channel_mean_default, channel_mean_avx2, channel_mean_avx512;

}  // namespace mghf
