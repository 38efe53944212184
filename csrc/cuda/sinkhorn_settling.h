// When Sinkhorn's iterations have nothing left to do. Twins: csrc/cpu/sinkhorn_settling.h, where the
// rule is explained, and settle() of kernels/sinkhorn_potentials.py.
#pragma once

#include "device.h"

namespace mghf::cuda {

struct Settling {
  static constexpr float kClean = 1e-5f;
  static constexpr float kFastest = 0.05f;
  static constexpr float kRest = 1e-6f;

  float previous = 1, rest = 1, rate = 1;

  // Of iterations 1, 2, ... and the spread of the changes of v in each; not true of the first. NaN
  // never settles.
  __device__ __forceinline__ bool settled(int t, float spread) {
    if (previous > kClean) {
      rate = spread / previous;
      rate = rate < kFastest ? kFastest : rate;
      rest = spread;
    } else {
      rest *= rate;
    }
    previous = spread;
    return t > 1 && rate * rest <= kRest * (1 - rate);
  }
};

}  // namespace mghf::cuda
