// The interface between the op `patches` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

struct PatchesOptions {
  int64_t patch_size, stride;
  int64_t height, width;      // of an image
  int64_t rows, columns;      // patches of a map
  int64_t maps;               // B C
  int64_t hidden, dimension;
  bool pairs;                 // products of bfloat16, by pairs; never for the weights' gradients
  const float* weight1;       // (row of the patch, hidden, column of the patch); pairs see below
  const float* bias1;         // (hidden)
  const float* weight2;       // (dimension, hidden)
  const float* bias2;         // (dimension)

  int64_t patches() const { return rows * columns; }
  // Words of the state of one patch and map: the bits of |y|, then one bit per hidden unit, set if
  // the unit is above 0.
  int64_t state_words() const { return 1 + (hidden + 31) / 32; }
  // Words of 32 bits of a patch's hidden layer, in the image's gradient.
  int64_t hidden_words() const { return pairs ? (hidden + 1) / 2 : hidden; }
};

// A word of 32 bits holds a pair of bfloat16 numbers, the first in its lower half. For the forward
// weight1 is then (row, hidden, pair of columns), for the gradient of the image
// (row, column, pair of hidden units), followed by kPairSlack columns of any finite values. Pairs
// need an even patch_size.
constexpr int64_t kPairSlack = 16;

// (B C, N, D), strides in elements.
struct EmbeddingView {
  const float* data;
  int64_t map_stride, patch_stride, dimension_stride;
};

// The inputs of the gradient of an embedding.
struct PatchesGradient {
  EmbeddingView grad;
  const float* embedding;  // contiguous
  const int32_t* state;    // (N, state_words, B C)
  int64_t state_step;      // numbers from one word of the state to the next, at least B C
};

// A kernel works on one group of `lanes` maps; there are `groups` of them. The caller provides
// scratch memory, 64-byte aligned.
struct PatchesKernels {
  int64_t lanes;
  bool pairs;  // whether the CPU multiplies pairs of bfloat16

  // One row of patches of one group of maps: there are groups * rows tasks, and task % groups is
  // the group.
  size_t (*forward_bytes)(const PatchesOptions&);
  void (*forward)(const PatchesOptions&, const ImageView& x, int64_t task, float* embedding,
                  int32_t* state, void* workspace);

  // The gradient before the ReLU, grad_hidden (group, N, hidden_words, lanes); the same tasks.
  size_t (*hidden_bytes)(const PatchesOptions&);
  void (*hidden)(const PatchesOptions&, const PatchesGradient&, int64_t task, float* grad_hidden,
                 void* workspace);

  // From it the gradient of x, written or added: `stride` rows of pixels of one group of maps per
  // task, groups * ceil(height / stride) tasks.
  size_t (*image_bytes)(const PatchesOptions&);
  void (*image)(const PatchesOptions&, const float* grad_hidden, const MutableImageView& grad_x,
                bool add, int64_t task, void* workspace);

  // The gradients of the second layer and of bias1, sums over the tasks of the forward. Each task
  // writes its share to layer2_size floats of its own: weight2 (D, padded_hidden), bias1
  // (padded_hidden), bias2 (D). It also stores the gradient before the ReLU, as
  // (group, N, lanes, padded_hidden), for the next kernel.
  int64_t (*padded_hidden)(const PatchesOptions&);
  int64_t (*layer2_size)(const PatchesOptions&);
  size_t (*layer2_bytes)(const PatchesOptions&);
  void (*layer2)(const PatchesOptions&, const PatchesGradient&, const ImageView& x, int64_t task,
                 float* grad_hidden, float* layer2, void* workspace);

  // The gradient of weight1, a sum over `parts` of the patches: part `task / patch_size` of row
  // `task % patch_size`, (column of the patch, padded_hidden) floats.
  int64_t parts;
  size_t (*layer1_bytes)(const PatchesOptions&);
  void (*layer1)(const PatchesOptions&, const float* grad_hidden, const ImageView& x, int64_t task,
                 float* layer1, void* workspace);
};

extern const PatchesKernels patches_default, patches_avx2, patches_avx512, patches_avx512_bf16,
    patches_amx;

}  // namespace mghf
