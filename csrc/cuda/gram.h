// Gram matrices of feature maps on a GPU; for the mathematics see mghf_fast/reference/gram.py.
#pragma once

#include "../common/precision.h"
#include "image.h"

namespace mghf::cuda {

int64_t gram_workspace_bytes(int64_t batch, int64_t channels, int64_t pixels);
int64_t gram_backward_workspace_bytes(int64_t batch, int64_t channels);

// Writes (B, C, C). x has at least one pixel and channel. The workspace is aligned to 16 bytes.
// Returns an error text, or null.
template <class T>
const char* gram(const Image<T>& x, double scale, Precision precision, float* result,
                 void* workspace, Stream stream);

// Writes the gradient of x for that of the result, (B, C, C), contiguous.
template <class T>
const char* gram_backward(const float* grad, const Image<T>& x, double scale,
                          Precision precision, const MutableImage<T>& grad_x, void* workspace,
                          Stream stream);

}  // namespace mghf::cuda
