// The strided patch projection and its gradients, on the CPU. See mghf_fast/reference/patches.py
// for the mathematics.
//
// Method. A vector's lanes are maps, of which a task takes one group; weights are scalars that all
// lanes share. The inner loops are register blocks of kUnits outputs x kPatches neighbouring
// patches. A few rows of the pixels under these patches are copied into [pixel][map], which fits
// the L1 cache, and are multiplied with the weights of all hidden units while the next rows are
// prefetched. weight1 streams from the L2 cache.
//
// Gradient. With the embedding e, |y| and the signs of the hidden layer from the forward,
//   d_y = (d_e - e <d_e, e> (1 + 1e-7 / |y|)) / (|y| + 1e-7),   d_hidden = (W2^T d_y) [hidden > 0]
// need neither x nor the hidden layer. The image's gradient is gathered: the image consists of
// cells of stride x stride pixels; pixel (r, p) of cell (i, j) is pixel (r + s stride,
// p + t stride) of patch (i - s, j - t), for all s, t that stay within the patch, so that
//   d_x = sum_st sum_h W1[h][r + s stride][p + t stride] d_hidden[i - s, j - t][h]
// is one sum in registers, and every pixel is written once.
//
// bfloat16. Where the CPU multiplies bfloat16, and the values of image and weight1 are bfloat16
// numbers, the first layer and its gradient use such products with float32 sums, over pairs of
// neighbouring pixels and pairs of hidden units. Only d_hidden is rounded.
//
// Floor. With M maps, N patches of P pixels, H hidden units and D dimensions, forward and backward
// each take M N H (P + D) multiply-adds; the forward reads x, the backward writes its gradient. The
// weights' gradients repeat the forward and take another M N H (P + D).
//
// This file is compiled once per instruction set, as MGHF_KERNELS, so everything in it has internal
// linkage (see vector.h).

#include "patches.h"

#include "patches_gradient.h"
#include "patches_layers.h"
#include "patches_weights.h"

namespace mghf {

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

const PatchesKernels MGHF_KERNELS = {
    kLanes, kPairs,        forward_bytes, forward,      hidden_bytes, hidden, image_bytes,
    image,  padded_hidden, layer2_size,   layer2_bytes, layer2,       kParts, forward_bytes,
    layer1,
};

}  // namespace mghf
