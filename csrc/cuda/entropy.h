// Histogram entropies of feature maps on a GPU; the mathematics stand in
// mghf_fast/reference/entropy.py.
#pragma once

#include "image.h"

namespace mghf::cuda {

// What entropy() needs beside its result: two floats for each run of a map, and counts.
int64_t entropy_workspace_bytes(int64_t batch, int64_t channels, int64_t pixels, int64_t bins);

// Writes (B, C) entropies; NaN for maps with a NaN, an infinity or a range that is none. The
// workspace is aligned to 16 bytes. Returns what went wrong, or null.
template <class T>
const char* entropy(const Image<T>& x, int64_t bins, float* result, void* workspace, Stream stream);

}  // namespace mghf::cuda
