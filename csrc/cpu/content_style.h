// The interface between the op `content_style` and its kernels, one per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "image.h"

namespace mghf {

// Statistics of a channel of a pair, S and G, and of D = S - G: means, variances, covariances and
// ranges.
enum Moment {
  kMeanSr, kMeanGt, kMeanDifference,
  kSrSr, kGtGt, kDifferenceDifference, kSrGt, kSrDifference,
  kLowSr, kHighSr, kLowGt, kHighGt,
  kMoments,
};

// The gradient of a channel of S is, with K the product of Gram's gradient,
//   difference D + centred (S - mean_of_centred) + other (X - mean_of_other) + K,
// where X is D if `like` is 1, for maps that are almost equal, and G if it is 0: with the other of
// the two the last terms before K would nearly cancel.
enum Coefficient {
  kOfDifference, kOfCentred, kMeanOfCentred, kOfOther, kMeanOfOther, kLike, kCoefficients,
};

struct StylePair {
  ImageView gt, sr;
};

// The channels that are kept, ascending.
struct KeptChannels {
  const int64_t* index;
  int64_t count;
};

// Kernels work on a run of the pixels of one image, with a caller's scratch memory, 64-byte
// aligned.
// `padded` are sizes rounded up to whole groups: rows of channels have padded(C) elements, matrices
// of kept channels M rows of padded(M).
struct ContentStyleKernels {
  int64_t (*padded)(int64_t channels);
  size_t (*workspace_bytes)(const StylePair&, int64_t kept);
  bool (*by_maps)(const StylePair&);

  // Computes moments[Moment] of one channel.
  void (*map_moments)(const StylePair&, int64_t b, int64_t channel, double* moments,
                      void* workspace);
  // Computes moments[Moment * padded(C) + channel] of a run.
  void (*run_moments)(const StylePair&, int64_t b, int64_t first, int64_t pixels, double* moments,
                      void* workspace);
  // Sets product_ij = sum (S - G)_i (S + G)_j over the run's pixels, i and j kept: its symmetric
  // part is S S^T - G G^T.
  void (*run_product)(const StylePair&, int64_t b, int64_t first, int64_t pixels,
                      const KeptChannels&, double* product, void* workspace);
  // coefficients[Coefficient * padded(C) + channel]; K = matrix^T S over the kept channels.
  void (*run_gradient)(const StylePair&, const MutableImageView& grad, int64_t b, int64_t first,
                       int64_t pixels, const KeptChannels&, const float* coefficients,
                       const float* matrix, void* workspace);
};

extern const ContentStyleKernels content_style_default, content_style_avx2, content_style_avx512;

}  // namespace mghf
