// The interface between the op `monce` and its kernels, one per instruction set.
#pragma once

#include "sinkhorn.h"

namespace mghf {

struct MonceOptions {
  SinkhornOptions sinkhorn;  // of the plan; its size is the number of patches
  int64_t depth;             // D: the embeddings are N x D
  double temperature;
  double negative_weight;  // Q
  bool differentiate_plan;
};

struct VectorView {
  const float* data;
  int64_t stride;
};

// Kernels work on one map, with a caller's scratch memory, 64-byte aligned. grad_query is dense.
struct MonceKernels {
  size_t (*workspace_bytes)(const MonceOptions&, bool backward);
  void (*forward)(const MonceOptions&, MatrixView query, MatrixView key, float* losses,
                  KeptIterates kept, void* workspace);
  void (*backward)(const MonceOptions&, VectorView grad, MatrixView query, MatrixView key,
                   KeptIterates kept, float* grad_query, void* workspace);
};

extern const MonceKernels monce_default, monce_avx2, monce_avx512;

}  // namespace mghf
