// Histogram entropies of feature maps on a GPU; for the mathematics see
// mghf_fast/reference/entropy.py.
#pragma once

#include "image.h"

namespace mghf::cuda {

// Size of the workspace of entropy(): two floats for each run of a map, and counts.
int64_t entropy_workspace_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t bins);

// Writes (B, C) entropies; NaN for maps with a NaN, an infinity or a range that is not finite. The
// workspace is aligned to 16 bytes. Returns an error text, or null.
template <class T>
const char* entropy(const Image<T>& x, int64_t bins, float* result, void* workspace, Stream stream);

}  // namespace mghf::cuda
