// The patch contrastive loss whose negatives a transport plan weighs, and its gradient, on a GPU;
// for the mathematics see mghf_fast/reference/monce.py.
#pragma once

#include "sinkhorn.h"

namespace mghf::cuda {

struct MonceOptions {
  TransportOptions transport;  // without a tolerance
  double temperature;
  double negative_weight;  // Q
  bool differentiate_plan;
};

// Size of the kernels' workspace for embeddings (batch, size, depth); it depends on the current
// GPU.
const char* monce_workspace_bytes(int64_t batch, int64_t size, int64_t depth,
                                  const MonceOptions& options, bool backward, int64_t& bytes);

// How many maps the backward should take at a time: half of them if they are solved on chip, some
// after others anyway, and their history would be large beside a step's features.
int64_t monce_backward_maps(int64_t batch, int64_t size, int64_t depth,
                            const MonceOptions& options);

// Writes the losses (B, N) of queries and keys (B, N, D) of the same type, NaN for a map with a NaN
// or an infinity; and the state for the backward, (B, 1 + 4 slots, N), with the iterates of `slots`
// iterations. The workspace is aligned to 16 bytes. Returns an error text, or null.
const char* monce(const Matrices& query, const Matrices& key, const MonceOptions& options,
                  float* losses, int* state, int slots, void* workspace, Stream stream);

// Writes the gradients (B, N, D) of the queries, in their type, for those of the losses, given as
// matrices of one column.
const char* monce_backward(const Matrices& grad, const Matrices& query, const Matrices& key,
                           const int* state, int slots, const MonceOptions& options,
                           void* grad_query, void* workspace, Stream stream);

}  // namespace mghf::cuda
