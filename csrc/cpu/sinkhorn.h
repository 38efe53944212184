// The interface between the op `sinkhorn` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/transport.h"

namespace mghf {

struct SinkhornOptions : TransportOptions {
  int64_t size;  // N: the matrices are N x N
};

struct MatrixView {
  const float* data;
  int64_t row_stride;
  int64_t column_stride;
};

// The state that the forward of `monce` saves for its backward, one map's part of the op's tensor:
// rows of N numbers. The first row holds the number of iterations made, 0 if the backward has to
// repeat them. Then each of the first iterations has four rows: u, v, and two for other backends.
struct KeptIterates {
  int32_t* rows;
  int64_t slots;

  int32_t& made() const { return rows[0]; }
  float* vector(int64_t t, int64_t which, int64_t n) const {
    return reinterpret_cast<float*>(rows + (1 + 4 * (t - 1) + which) * n);
  }
  void clear(int64_t n) const {
    __builtin_memset(rows, 0, static_cast<size_t>((1 + 4 * slots) * n) * sizeof(int32_t));
  }
};

// Kernels work on one matrix, with a caller's scratch memory, 64-byte aligned.
struct SinkhornKernels {
  size_t (*workspace_bytes)(const SinkhornOptions&, bool backward);
  void (*forward)(const SinkhornOptions&, MatrixView similarity, float* plan, void* workspace);
  void (*backward)(const SinkhornOptions&, MatrixView grad, MatrixView similarity,
                   float* grad_similarity, void* workspace);
};

extern const SinkhornKernels sinkhorn_default, sinkhorn_avx2, sinkhorn_avx512;

}  // namespace mghf
