// The invertible block and the gradient of its input on a GPU; the mathematics stand in
// mghf_fast/reference/coupling.py.
#pragma once

#include "image.h"

namespace mghf::cuda {

enum class Activation { relu6, softplus, leaky_relu };

struct CouplingShape {
  int64_t inputs;    // channels of x
  int64_t channels;  // C of the features, even, at most kMostCouplingChannels
  int64_t kernel;    // of the mix: 1, or 3 with zero padding
  Activation activation;
  float clamp;  // of rho; 0 for none
};

constexpr int64_t kMostCouplingChannels = 256;

inline int64_t coupling_weight_count(const CouplingShape& s) {
  const int64_t c = s.channels / 2;
  return s.channels * (s.inputs * s.kernel * s.kernel + 1) + 3 * (4 * c * c + 18 * c);
}

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

// The value at x (B, inputs, H, W) into y (B, C, H, W). The weights are float32 and follow each
// other: mix (C, inputs, k, k), bias (C), then expand (2 c, c), depthwise (2 c, 3, 3) and project
// (c, 2 c) of phi, rho and eta. Returns what went wrong, or null; as do the others.
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
