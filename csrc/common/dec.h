// The sizes and options of DECLoss, for the CPU and for CUDA.
#pragma once

#include <cstdint>

namespace mghf {

struct DecOptions {
  int64_t patches, depth;   // P and D: both inputs are (P, D)
  float positive_exponent;  // log2(e) / temperature: exp(s / t) = 2^(s * exponent)
  float negative_exponent;
  float limit;  // a pair is positive up to this squared distance; below 0: no pair is
  float norm_floor;  // the minimum norm that a patch is divided by
};

}  // namespace mghf
