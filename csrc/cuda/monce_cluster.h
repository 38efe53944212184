// The kernels of `monce` for maps that a cluster of blocks solves on chip; see
// monce_cluster_block.h. They take and leave the state that the kernels of monce_chip.h do.
#pragma once

#include "monce.h"

namespace mghf::cuda {

// Whether clusters of the current device take maps of n patches of that depth.
bool fits_cluster(int64_t n, int64_t depth, const MonceOptions& options);

const char* cluster_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options,
                                    bool backward, int64_t& bytes);

// As monce() and monce_backward(). Losses, or the gradient, of a map whose sums leave float32's
// range are NaN.
const char* monce_by_clusters(const Matrices& query, const Matrices& key,
                              const MonceOptions& options, float* losses, int* state, int slots,
                              void* workspace, Stream stream);
const char* monce_backward_by_clusters(const Matrices& grad, const Matrices& query,
                                       const Matrices& key, const int* state, int slots,
                                       const MonceOptions& options, void* grad_query,
                                       void* workspace, Stream stream);

}  // namespace mghf::cuda
