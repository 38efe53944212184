// The factors of a warpgroup's products: 64 pixels, a row of hidden values or any others, and
// packed weights.
#pragma once

#include "coupling_rows_weights.h"
#include "wgmma.h"

namespace mghf::cuda {

namespace {

// A thread's place: two neighbouring pixels of 64, and every fourth quad of channels.
struct PlaceInRow {
  int lane, pixel;

  __device__ __forceinline__ PlaceInRow()
      : lane(static_cast<int>(threadIdx.x) % 4),
        pixel(static_cast<int>(threadIdx.x) % kWarpgroup / kWarp * kGroup +
              static_cast<int>(threadIdx.x) % kWarp / 4 * 2) {}
};

template <int kGroups>
struct FeaturesOfRow {
  float of[kGroups][2][4];
};

// They as halves. The power of two is that of each pixel's largest, so that a large pixel costs
// others nothing, and a result does not depend on which pixels are together. Of one part there is
// only `big`.
template <int kGroups, int kParts>
struct RowFactors {
  PowerOfTwo scale[2];
  uint32_t big[kGroups][4], small[kParts == 2 ? kGroups : 1][4];

  __device__ __forceinline__ explicit RowFactors(const FeaturesOfRow<kGroups>& features) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      float largest = 0;
      MGHF_UNROLL_ALL
      for (int n = 0; n < kGroups; ++n) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) largest = fmaxf(largest, fabsf(features.of[n][i][q]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      scale[i] = PowerOfTwo(fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2)));
    }
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        const float(&of)[4] = features.of[n][i % 2];
        const float by = scale[i % 2].by;
        const SplitHalves pair(of[i / 2 * 2] * by, of[i / 2 * 2 + 1] * by);
        big[n][i] = pair.big;
        if constexpr (kParts == 2) small[n][i] = pair.small;
      }
    }
  }
};

// The columns of a packed matrix from one of them on, for the depths of a group.
template <int kColumns>
__device__ __forceinline__ SharedColumns columns_of(const unsigned char* matrix, int group,
                                                    int first_column) {
  constexpr int kAlongDepth = kColumns / 8 * 128;
  return SharedColumns(matrix + group * 2 * kAlongDepth + first_column / 8 * 128, kAlongDepth, 128);
}

}  // namespace

}  // namespace mghf::cuda
