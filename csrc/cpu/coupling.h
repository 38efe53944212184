// The interface between the op `coupling` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/coupling.h"
#include "image.h"

namespace mghf {

struct CouplingOptions : CouplingShape {
  int64_t height, width;
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
  size_t (*packed_bytes)(const CouplingOptions&);
  void (*pack)(const CouplingOptions&, const CouplingWeights&, void* packed);

  size_t (*forward_workspace)(const CouplingOptions&);
  void (*forward)(const CouplingOptions&, const void* packed, const CouplingTile&, ImageView x,
                  MutableImageView y, void* workspace);
  // Takes N, the inverse of the mix, in place of the mix, and -N bias in place of the bias.
  void (*inverse)(const CouplingOptions&, const void* packed, const CouplingTile&, ImageView y,
                  MutableImageView x, void* workspace);
  // The gradient of x; and, unless `gradients` is null, this tile's share of those of the weights,
  // `gradient_floats` floats that `unpack` reads.
  size_t (*backward_workspace)(const CouplingOptions&, bool with_weights);
  void (*backward)(const CouplingOptions&, const void* packed, const CouplingTile&, ImageView grad,
                   ImageView x, MutableImageView grad_x, float* gradients, void* workspace);
  // The number of floats of one tile's weight gradients, and their conversion to PyTorch's layout.
  int64_t (*gradient_floats)(const CouplingOptions&);
  void (*unpack_gradients)(const CouplingOptions&, const float* gradients,
                           const CouplingWeightGradients&);
};

extern const CouplingKernels coupling_default, coupling_avx2, coupling_avx512,
    coupling_avx512_bf16, coupling_amx;

}  // namespace mghf
