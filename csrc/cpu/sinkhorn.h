// The interface between the op `sinkhorn` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mghf {

enum class TransportCost { hard, easy, exp };

struct SinkhornOptions {
  int64_t size;  // N: the matrices are N x N
  TransportCost cost;
  double epsilon;
  int64_t iterations;
  bool has_tolerance;
  float tolerance;  // largest marginal error at which the iterations stop
};

struct MatrixView {
  const float* data;
  int64_t row_stride;
  int64_t column_stride;
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
