// Sinkhorn's plans and their gradients on a GPU; for the mathematics see
// mghf_fast/reference/sinkhorn.py.
#pragma once

#include "../common/transport.h"
#include "matrix.h"

namespace mghf::cuda {

// The most rows that the kernels take.
constexpr int64_t kMostTransported = 1 << 20;

// Size of the kernels' workspace, which depends on the current GPU.
const char* sinkhorn_workspace_bytes(int64_t batch, int64_t size, int64_t iterations,
                                     bool backward, int64_t& bytes);

// Writes the plans (B, N, N), in similarity's type; NaN for a matrix with a NaN or an infinity off
// its diagonal. The workspace is aligned to 16 bytes. Returns an error text, or null.
const char* sinkhorn(const Matrices& similarity, const TransportOptions& options, void* plan,
                     void* workspace, Stream stream);

// Writes the gradients (B, N, N) of the similarities, in their type, for those of the plans.
const char* sinkhorn_backward(const Matrices& grad, const Matrices& similarity,
                              const TransportOptions& options, void* grad_similarity,
                              void* workspace, Stream stream);

}  // namespace mghf::cuda
