// The interface between the op `dec` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dec.h"

namespace mghf {

// (P, D) patches, strides in elements.
struct PatchesView {
  const float* data;
  int64_t patch_stride, value_stride;
};

// For every row i, the sums of exp(cos(S_i, S_j)/t) + 2 exp(cos(G_i, S_j)/t) over its positives and
// over its negatives, and whether it has negatives.
struct DecSums {
  double *positive, *negative;
  bool* has_negative;
};

// d loss / d sums of row i, as factors of a pair's exponentials: the derivative with respect to
// cos(S_i, S_j) is factor_i * exp(cos(S_i, S_j)/t), and with respect to cos(G_i, S_j) it is
// 2 factor_i exp(cos(G_i, S_j)/t).
struct DecFactors {
  const float *positive, *negative;
};

// The pairs are processed tile by tile: `tile` patches, and their pairs with `tile` others. Tiles
// (a, b) and (b, a) are one task. Tasks that have no tile in common may run at the same time.
struct DecKernels {
  int64_t (*tile)(const DecOptions&);
  size_t (*packed_bytes)(const DecOptions&, bool backward);
  size_t (*workspace_bytes)(const DecOptions&, bool backward);
  // Copies one tile of patches into the 64-byte aligned `packed`, which all calls share. With
  // factors (for the backward) it also clears the tile's gradient.
  void (*pack)(const DecOptions&, PatchesView sr, PatchesView gt, const DecFactors*, int64_t tile,
               void* packed);
  void (*forward)(const DecOptions&, int64_t tile, int64_t other, void* packed, DecSums,
                  void* workspace);
  void (*backward)(const DecOptions&, int64_t tile, int64_t other, void* packed, void* workspace);
  // From the gradient of the unit patches to that of sr, contiguous.
  void (*project)(const DecOptions&, int64_t tile, void* packed, float* grad_sr);
};

extern const DecKernels dec_default, dec_avx2, dec_avx512;

}  // namespace mghf
