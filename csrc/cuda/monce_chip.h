// The kernels of `monce` for maps that one block solves on chip; see monce_chip_block.h. They take
// and leave the state that the kernels of monce.cu do.
#pragma once

#include "monce.h"

namespace mghf::cuda {

// Whether a block with that much shared memory takes maps of n patches of that depth.
bool fits_chip(int64_t n, int64_t depth, const MonceOptions& options, int64_t shared_bytes);

int64_t chip_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options,
                             bool backward);

// As monce() and monce_backward(), for n > 1. Losses, or the gradient, of a map whose sums leave
// float32's range are NaN.
const char* monce_on_chip(const Matrices& query, const Matrices& key, const MonceOptions& options,
                          float* losses, int* state, int slots, void* workspace, Stream stream);
const char* monce_backward_on_chip(const Matrices& grad, const Matrices& query,
                                   const Matrices& key, const int* state, int slots,
                                   const MonceOptions& options, void* grad_query, void* workspace,
                                   Stream stream);

}  // namespace mghf::cuda
