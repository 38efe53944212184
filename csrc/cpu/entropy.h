// The interface between the ops `entropy` and `content_style` and the kernels of histograms, which
// exist once per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

// Kernels work on a map or a run of pixels, with a caller's scratch memory, 64-byte aligned.
struct EntropyKernels {
  // Whether to call the maps' functions or the runs' (both are right for any layout).
  bool (*by_maps)(const ImageView&, int64_t bins);
  size_t (*map_workspace_bytes)(int64_t bins);
  size_t (*run_workspace_bytes)(const ImageView&);

  // Smallest and largest value of a map; both NaN if one is NaN or infinite, or the range is.
  void (*map_range)(const ImageView&, int64_t b, int64_t channel, float* low, float* high,
                    void* workspace);
  double (*map_entropy)(const ImageView&, int64_t b, int64_t channel, float low, float high,
                        int64_t bins, void* workspace);

  // The same for all channels of the pixels from `first` on. low and high have padded_channels()
  // elements; counts, which are overwritten, have as many rows of count_step(). All are aligned
  // like the workspace.
  int64_t (*padded_channels)(int64_t channels);
  int64_t (*count_step)(int64_t bins);
  void (*run_range)(const ImageView&, int64_t b, int64_t first, int64_t pixels, float* low,
                    float* high, void* workspace);
  void (*run_counts)(const ImageView&, int64_t b, int64_t first, int64_t pixels, const float* low,
                     const float* high, int64_t bins, uint32_t* counts, void* workspace);
  // The entropy of a map of `pixels` pixels whose counts are the sums over `runs` rows.
  double (*entropy)(const uint32_t* counts, int64_t runs, int64_t run_step, int64_t bins,
                    int64_t pixels);
};

extern const EntropyKernels entropy_default, entropy_avx2, entropy_avx512;

}  // namespace mghf
