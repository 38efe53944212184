// The gradients of the weights of the invertible block on a GPU; for the mathematics see
// mghf_fast/reference/coupling.py.
#pragma once

#include "../common/coupling.h"
#include "image.h"

namespace mghf::cuda {

// The workspace is aligned to 16 bytes. It holds the float32 layers of so many rows of one image as
// fit into coupling_layer_bytes, but at least 8 and their halo. Only tests change this number.
extern int64_t coupling_layer_bytes;
template <class T>
int64_t coupling_weights_workspace_bytes(const CouplingShape& shape, const Image<T>& x);

// Writes the gradients of the weights, float32 and in their order (common/coupling.h), for that of
// the block's value at x. It needs nothing of the forward. Returns an error text, or null.
template <class T>
const char* coupling_weights(const CouplingShape& shape, const Image<T>& grad, const Image<T>& x,
                             const float* weights, float* grad_weights, void* workspace,
                             Stream stream);

}  // namespace mghf::cuda
