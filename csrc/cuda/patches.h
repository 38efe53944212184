// The strided patch projection and its gradients on a GPU; for the mathematics see
// mghf_fast/reference/patches.py, for the state mghf_fast/ops/patches.py.
#pragma once

#include "../common/precision.h"
#include "image.h"

namespace mghf::cuda {

struct Projection {
  int64_t patch_size, stride, hidden, dimension;
  const float* weight1;  // (hidden, patch_size^2)
  const float* bias1;    // (hidden)
  const float* weight2;  // (dimension, hidden)
  const float* bias2;    // (dimension)
  Precision precision;   // of the products but those of the weights' gradients
  bool is_packed;        // whether `packed` is what patches_pack() wrote of these weights
  void* packed;

  int64_t pixels() const { return patch_size * patch_size; }
  int64_t state_words() const { return 1 + (hidden + 31) / 32; }
  int64_t patches(int64_t height, int64_t width) const {
    return ((height - patch_size) / stride + 1) * ((width - patch_size) / stride + 1);
  }
};

// The inputs of the gradients: strides in elements; embedding and state are the forward's results,
// or those of some neighbouring maps.
struct EmbeddingGradient {
  const float* grad;
  int64_t map_stride, patch_stride, dimension_stride;
  const float* embedding;
  const int* state;
  int64_t state_step;  // from one word of the state to the next, at least B C
};

struct ParameterGradients {
  float *weight1, *bias1, *weight2, *bias2;
};

// All return an error text, or null. Workspaces are aligned to 16 bytes.

// Packs the weights for the forward and for the image's gradient, which else do so in their
// workspace, each time. It needs no biases.
int64_t patches_packed_bytes(const Projection& projection);
const char* patches_pack(const Projection& projection, Stream stream);

// Writes embedding (B C, N, D) and state (N, state_words, B C).
int64_t patches_workspace_bytes(const Projection& projection);
template <class T>
const char* patches(const Image<T>& x, const Projection& projection, float* embedding, int* state,
                    void* workspace, Stream stream);

// Writes the gradient of the image, or adds it. It needs no biases.
int64_t patches_backward_workspace_bytes(const Projection& projection, int64_t maps, int64_t height,
                                         int64_t width);
template <class T>
const char* patches_backward(const MutableImage<T>& grad_x, bool add, const Projection& projection,
                             const EmbeddingGradient& gradient, void* workspace, Stream stream);

// Writes the gradients of the weights and biases. It needs no bias2.
int64_t patches_backward_weights_workspace_bytes(const Projection& projection, int64_t maps,
                                                 int64_t height, int64_t width);
template <class T>
const char* patches_backward_weights(const Image<T>& x, const Projection& projection,
                                     const EmbeddingGradient& gradient,
                                     const ParameterGradients& result, void* workspace,
                                     Stream stream);

}  // namespace mghf::cuda
