// The patch contrastive loss whose negatives a transport plan weighs, and its gradient, on a GPU;
// the mathematics stand in mghf_fast/reference/monce.py.
#pragma once

#include "sinkhorn.h"

namespace mghf::cuda {

struct MonceOptions {
  TransportOptions transport;  // without a tolerance
  double temperature;
  double negative_weight;  // Q
  bool differentiate_plan;
};

// What the kernels need beside their results. Depends on the current GPU.
const char* monce_workspace_bytes(int64_t batch, int64_t size, const MonceOptions& options,
                                  bool backward, int64_t& bytes);

// Writes the losses (B, N) of queries and keys (B, N, D), which have one type; NaN for a map with a
// NaN or an infinity; and the state for the backward, (B, 1 + 4 slots, N), with the iterates of as many
// iterations. The workspace is aligned to 16 bytes. Returns what went wrong, or null.
const char* monce(const Matrices& query, const Matrices& key, const MonceOptions& options,
                  float* losses, int* state, int slots, void* workspace, Stream stream);

// Writes the gradients (B, N, D) of the queries, of their type, for those of the losses, which are
// matrices of one column.
const char* monce_backward(const Matrices& grad, const Matrices& query, const Matrices& key,
                           const int* state, int slots, const MonceOptions& options,
                           void* grad_query, void* workspace, Stream stream);

}  // namespace mghf::cuda
