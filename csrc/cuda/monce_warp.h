// The kernels of `monce` for maps that one warp solves; see monce_warp_block.h. They take and leave
// the state that the kernels of monce_chip.h do.
#pragma once

#include "monce.h"

namespace mghf::cuda {

// Whether warps take maps of n patches of that depth, where a block has that much shared memory.
bool fits_warp(int64_t n, int64_t depth, const MonceOptions& options, int64_t shared_bytes);

int64_t warp_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options, bool backward);

// As monce() and monce_backward(), for n > 1. Losses, or the gradient, of a map whose sums leave
// float32's range are NaN.
const char* monce_by_warps(const Matrices& query, const Matrices& key, const MonceOptions& options,
                           float* losses, int* state, int slots, void* workspace, Stream stream);
const char* monce_backward_by_warps(const Matrices& grad, const Matrices& query,
                                    const Matrices& key, const int* state, int slots,
                                    const MonceOptions& options, void* grad_query, void* workspace,
                                    Stream stream);

}  // namespace mghf::cuda
