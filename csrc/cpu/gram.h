// The interface between the op `gram` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

// Kernels work on a run of the pixels of one image, with a caller's scratch memory, 64-byte
// aligned. Matrices are C rows of padded(C) elements, C rounded up to whole groups.
struct GramKernels {
  int64_t (*padded)(int64_t channels);
  size_t (*workspace_bytes)(const ImageView&);
  // Sets sums_ij = sum over the run's pixels of F_i F_j for i <= j (and some others).
  void (*run_sums)(const ImageView&, int64_t b, int64_t first, int64_t pixels, double* sums,
                   void* workspace);
  // grad = matrix F over the run's pixels; the matrix is symmetric.
  void (*run_gradient)(const ImageView&, const MutableImageView& grad, int64_t b, int64_t first,
                       int64_t pixels, const float* matrix, void* workspace);
};

extern const GramKernels gram_default, gram_avx2, gram_avx512;

}  // namespace mghf
