// The shape and options of an invertible block, for the CPU and for CUDA.
#pragma once

#include <cstdint>

namespace mghf {

enum class Activation { relu6, softplus, leaky_relu };

struct CouplingShape {
  int64_t inputs;    // channels of x
  int64_t channels;  // C of the features, even
  int64_t kernel;    // of the mix: 1, or 3 with zero padding
  Activation activation;
  float clamp;  // of rho; 0 for none
};

// Elements of the flat tensor of weights: mix (C, inputs, k, k), bias (C), then expand (2 c, c),
// depthwise (2 c, 3, 3) and project (c, 2 c) of phi, rho and eta, with c = C / 2.
inline int64_t coupling_weight_count(const CouplingShape& s) {
  const int64_t c = s.channels / 2;
  return s.channels * (s.inputs * s.kernel * s.kernel + 1) + 3 * (4 * c * c + 18 * c);
}

}  // namespace mghf
