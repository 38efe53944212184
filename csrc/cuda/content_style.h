// MGHF-n and the content-style terms of a pair of feature stacks on a GPU; for the mathematics see
// mghf_fast/reference/content_style.py.
#pragma once

#include "../common/precision.h"
#include "image.h"

namespace mghf::cuda {

// Rows of the moments that the forward returns for the backward.
constexpr int64_t kStyleMoments = 6;

struct StyleOptions {
  int64_t top_m;
  double alpha, gamma;
  int64_t bins;
  Precision precision;  // of Gram's products
};

// Results of the forward, contiguous: (B,) each, (B, M), (B, M), (B, 6, M), (B, M, M).
struct StyleResults {
  float *naive, *mse, *correlation, *gram;
  int64_t* kept;
  float *weights, *moments, *difference;
};

// The backward's inputs: the terms' gradients, (B,) of any stride, and the forward's results.
struct StyleGradients {
  const float* data[4];  // of naive, mse, correlation, gram
  int64_t strides[4];
};
struct StyleStatistics {
  int64_t top_m;
  const int64_t* kept;
  const float *weights, *moments, *difference;
  Precision precision;
};

template <class T>
int64_t content_style_workspace_bytes(const Image<T>& sr, const StyleOptions& options);
template <class T>
int64_t content_style_backward_workspace_bytes(const Image<T>& sr, int64_t top_m);

// The images have one shape and at least one pixel and channel. Workspaces are aligned to 16 bytes.
// Both functions return an error text, or null.
template <class T>
const char* content_style(const Image<T>& gt, const Image<T>& sr, const StyleOptions& options,
                          const StyleResults& results, void* workspace, Stream stream);

// `kept` has distinct channels.
template <class T>
const char* content_style_backward(const StyleGradients& grads, const Image<T>& gt,
                                   const Image<T>& sr, const StyleStatistics& statistics,
                                   const MutableImage<T>& grad_sr, void* workspace, Stream stream);

}  // namespace mghf::cuda
