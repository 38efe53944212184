// DECLoss and its gradient on a GPU; for the mathematics see mghf_fast/reference/dec.py.
#pragma once

#include "../common/dec.h"
#include "matrix.h"

namespace mghf::cuda {

// Kernels count patches and values, rounded up to their tiles, in 32 bits.
constexpr int64_t kMostDecPatches = int64_t{1} << 30, kMostDecValues = int64_t{1} << 24;

// How many blocks are to fill a GPU in the forward, and twice those of the backward, whose blocks
// need more of a multiprocessor. Only tests change this number.
extern int dec_blocks;

int64_t dec_workspace_bytes(const DecOptions& options);
int64_t dec_backward_workspace_bytes(const DecOptions& options);

// Writes the loss and, as `statistics` (2, P), each row's sums of exp(cos(S_i, S_j)/t) +
// 2 exp(cos(G_i, S_j)/t) over its positives and over its negatives, the latter -1 where it has
// none. `offset` is added to the logarithm of their ratio. There is at least one patch and value.
// The workspace is aligned to 16 bytes. This and the function below return an error text, or null.
const char* dec(const DecOptions& options, const Matrices& sr, const Matrices& gt, double offset,
                float* loss, float* statistics, void* workspace, Stream stream);

// What the gradient takes besides the options: 1 / t of positives and of negatives, or 1 if the
// temperatures are outside the exponentials.
struct DecScales {
  float positive, negative;
};

// Writes the gradient of sr, contiguous and of its type, for that of the loss.
const char* dec_backward(const DecOptions& options, const DecScales& scales, const float* grad,
                         const Matrices& sr, const Matrices& gt, const float* statistics,
                         void* grad_sr, void* workspace, Stream stream);

}  // namespace mghf::cuda
