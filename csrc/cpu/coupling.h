// The interface between the op `coupling` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

enum class Activation { relu6, softplus, leaky_relu };

struct CouplingShape {
  int64_t inputs;    // channels of x
  int64_t channels;  // C of the features, even
  int64_t kernel;    // of the mix: 1, or 3 with zero padding
  int64_t height, width;
  Activation activation;
  float clamp;  // of rho; 0 for none
  // Products in bfloat16, where the kernels have them; C a multiple of 64, no weight gradients.
  bool bfloat16_products;
};

// Contiguous float32, in PyTorch's layout.
template <class Data>
struct BasicCouplingWeights {
  struct Subnet {
    Data *expand, *depthwise, *project;
  };
  Data *mix, *bias;
  Subnet phi, rho, eta;
};
using CouplingWeights = BasicCouplingWeights<const float>;
using CouplingWeightGradients = BasicCouplingWeights<float>;

// The part of image `batch` that one task writes.
struct CouplingTile {
  int64_t batch, y_begin, y_end, x_begin, x_end;
};
constexpr int64_t kCouplingTileRows = 128, kCouplingTileColumns = 64;

struct CouplingKernels {
  // The weights as the kernels read them, made once for all tasks.
  size_t (*packed_bytes)(const CouplingShape&);
  void (*pack)(const CouplingShape&, const CouplingWeights&, void* packed);

  size_t (*forward_workspace)(const CouplingShape&);
  void (*forward)(const CouplingShape&, const void* packed, const CouplingTile&, ImageView x,
                  MutableImageView y, void* workspace);
  // With the inverse of the mix, minus its product with the bias, in place of mix and bias.
  void (*inverse)(const CouplingShape&, const void* packed, const CouplingTile&, ImageView y,
                  MutableImageView x, void* workspace);
  // The gradient of x; and, into `gradients` if that is not null, those of the weights that come
  // from this tile, in the order and with the layout of `gradient_floats` of `unpack`.
  size_t (*backward_workspace)(const CouplingShape&, bool with_weights);
  void (*backward)(const CouplingShape&, const void* packed, const CouplingTile&, ImageView grad,
                   ImageView x, MutableImageView grad_x, float* gradients, void* workspace);
  // Floats of one tile's weight gradients, and their way into PyTorch's layout.
  int64_t (*gradient_floats)(const CouplingShape&);
  void (*unpack_gradients)(const CouplingShape&, const float* gradients,
                           const CouplingWeightGradients&);
};

extern const CouplingKernels coupling_default, coupling_avx2, coupling_avx512,
    coupling_avx512_bf16, coupling_amx;

}  // namespace mghf
