// The invertible block and the gradient of its input on a GPU; for the mathematics see
// mghf_fast/reference/coupling.py.
#pragma once

#include "../common/coupling.h"
#include "image.h"

namespace mghf::cuda {

constexpr int64_t kMostCouplingChannels = 256;

// The workspace of the ops is aligned to 16 bytes. It holds packed weights, and features of as many
// images at a time as fit into coupling_feature_bytes, or else of as many rows of one image, with a
// halo, at least 8. Only tests change this number.
extern int64_t coupling_feature_bytes;
template <class T>
int64_t coupling_workspace_bytes(const CouplingShape& shape, const Image<T>& x);
template <class T>
int64_t coupling_backward_workspace_bytes(const CouplingShape& shape, const Image<T>& x);
template <class T>
int64_t coupling_inverse_workspace_bytes(const CouplingShape& shape, const Image<T>& y);

// Writes the value at x (B, inputs, H, W) to y (B, C, H, W). The weights are float32, in the order
// of common/coupling.h. This and the functions below return an error text, or null.
template <class T>
const char* coupling(const CouplingShape& shape, const Image<T>& x, const float* weights,
                     const MutableImage<T>& y, void* workspace, Stream stream);

// Writes the gradient of x for that of y.
template <class T>
const char* coupling_backward(const CouplingShape& shape, const Image<T>& grad, const Image<T>& x,
                              const float* weights, const MutableImage<T>& grad_x,
                              void* workspace, Stream stream);

// Writes the x (B, C, H, W) whose value is y, for a 1x1 mix of C inputs. The weights begin with N,
// the inverse of the mix, and -N bias instead of mix and bias.
template <class T>
const char* coupling_inverse(const CouplingShape& shape, const Image<T>& y, const float* weights,
                             const MutableImage<T>& x, void* workspace, Stream stream);

}  // namespace mghf::cuda
