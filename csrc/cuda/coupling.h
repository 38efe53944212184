// The invertible block and the gradient of its input on a GPU; the mathematics stand in
// mghf_fast/reference/coupling.py.
#pragma once

#include "../common/coupling.h"
#include "image.h"

namespace mghf::cuda {

constexpr int64_t kMostCouplingChannels = 256;

// What the ops need beside their results, aligned to 16 bytes: packed weights, and features of as many
// images at a time as go into coupling_feature_bytes, or else of as many rows of one, with a halo; of
// 8 rows at least. Only tests change it.
extern int64_t coupling_feature_bytes;
template <class T>
int64_t coupling_workspace_bytes(const CouplingShape& shape, const Image<T>& x);
template <class T>
int64_t coupling_backward_workspace_bytes(const CouplingShape& shape, const Image<T>& x);
template <class T>
int64_t coupling_inverse_workspace_bytes(const CouplingShape& shape, const Image<T>& y);

// The value at x (B, inputs, H, W) into y (B, C, H, W). The weights are float32, in the order that
// common/coupling.h gives. Returns what went wrong, or null; as do the others.
template <class T>
const char* coupling(const CouplingShape& shape, const Image<T>& x, const float* weights,
                     const MutableImage<T>& y, void* workspace, Stream stream);

// The gradient of x for that of y.
template <class T>
const char* coupling_backward(const CouplingShape& shape, const Image<T>& grad, const Image<T>& x,
                              const float* weights, const MutableImage<T>& grad_x,
                              void* workspace, Stream stream);

// The x (B, C, H, W) whose value is y, for a 1x1 mix of C inputs. In place of mix and bias the weights
// begin with the inverse of the mix and minus its product with the bias.
template <class T>
const char* coupling_inverse(const CouplingShape& shape, const Image<T>& y, const float* weights,
                             const MutableImage<T>& x, void* workspace, Stream stream);

}  // namespace mghf::cuda
