// The sub-networks' kernel for the gradient; see coupling.cu.
#pragma once

#include "coupling_stages.h"

namespace mghf::cuda {

namespace {

// result (features) = direct + sum over the sub-networks of S^T(gradients; f).
template <class T>
struct BackwardStage : Stage<T> {
  int count;                 // of sub-networks
  Features<T> gradients[2];  // of their results
  Channels<T> direct;
  Features<T> result;
};

// In the last step a warp has kRowsOfWarp rows of the tile and one of kParts parts of the slice.
template <class T, int kHalfOf, int kRowsOf, int kRowsOfWarpOf, int kPartsOf, int kWarpsOf,
          int kSliceOf>
struct BackwardSizes {
  static constexpr int kHalf = kHalfOf, kRows = kRowsOf, kRowsOfWarp = kRowsOfWarpOf;
  static constexpr int kParts = kPartsOf, kWarps = kWarpsOf, kSlice = kSliceOf;
  static constexpr int kThreads = kWarps * kWarp, kGroups = kHalf / kGroup;
  static constexpr int kWarpsOfPart = kRows / kRowsOfWarp;
  static constexpr int kAcross = kColumns + 4, kPixels = (kRows + 4) * kAcross;
  static constexpr int kInnerAcross = kColumns + 2, kInnerPixels = (kRows + 2) * kInnerAcross;
  static constexpr int kFeatures = Tile<T, kHalf>::size(kPixels);  // elements
  static constexpr int kGradients = Tile<T, kHalf>::size(kInnerPixels);
  static constexpr int kHidden = Tile<T, kSlice>::size(kPixels);
  static constexpr int kThrough = Tile<T, kSlice>::size(kInnerPixels);
  static constexpr size_t kBytes =
      (kFeatures + kGradients + kHidden + kThrough) * sizeof(T) + 9 * kSlice * 4;
  static_assert(kWarpsOfPart * kParts <= kWarps && kSlice % (kParts * kGroup) == 0);
};

// A' P^T g at the pixels of the tile with a halo of one; zeros outside of the image.
template <class Z, class T>
__device__ __forceinline__ void go_through_project(const Tile<T, Z::kSlice>& through,
                                                   const Tile<T, Z::kHalf>& gradients,
                                                   const Tile<T, Z::kSlice>& hidden,
                                                   const float* taps, const BackwardStage<T>& s,
                                                   const SubnetWeights& w, int slice,
                                                   const TileOrigin& place) {
  using S = Share<Z::kInnerPixels, Z::kSlice, Z::kWarps>;
  const S share;
  Values sum[S::kGroups][S::kRows] = {};
  multiply_tile<Fast<T>, S, Z::kInnerPixels>(sum, share, gradients, w.project_transposed,
                                             slice * (Z::kSlice / kGroup));
  MGHF_UNROLL_ALL
  for (int i = 0; i < S::kRows; ++i) {
    const int pixel = share.pixel(i), known = pixel < Z::kInnerPixels ? pixel : 0;
    const int y = known / Z::kInnerAcross, x = known % Z::kInnerAcross;
    MGHF_UNROLL_ALL
    for (int n = 0; n < S::kGroups; ++n) {
      Values inner[1] = {};
      depthwise<Z::kAcross, false>(inner, hidden, taps, share.first_group + n, y * Z::kAcross + x);
      go_back<kValues>(sum[n][i].all(), inner[0].all(), s.activation);
      MGHF_UNROLL_ALL
      for (int of = 0; of < 2; ++of) {
        const bool inside = s.tiling.holds(place.y + y - 1, place.x + x + of - 1);
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = inside ? sum[n][i].at(of, q) : 0.0f;
        if (pixel < Z::kInnerPixels) through.write(pixel + of, share.first_group + n, quad);
      }
    }
  }
}

// Whether along one axis tap i of the pixel at `at` - 1 + step reads the pixel at `at`, directly or
// by reflection at a border.
__device__ __forceinline__ bool reaches(int i, int step, int at, int size) {
  if (i == 2 - step) return true;
  if (step == 1) return size == 1;
  return i == step && at == (step == 0 ? 1 : size - 2);
}

// The transposed 3x3 layer at a row of pixels, any of which may be next to a border of the image.
template <class Z, class T>
__device__ __forceinline__ void transposed_at_border(Values& sum,
                                                     const Tile<T, Z::kSlice>& through,
                                                     const float* taps, int group,
                                                     int first, const Tiling& tiling, int y,
                                                     int x) {
  MGHF_UNROLL(1)
  for (int step = 0; step < 9; ++step) {
    const int down = step / 3, across = step % 3;
    float quad[2][4];
    MGHF_UNROLL_ALL
    for (int pixel = 0; pixel < 2; ++pixel) {
      through.read(first + pixel + down * Z::kInnerAcross + across, group, quad[pixel]);
    }
    MGHF_UNROLL(1)
    for (int tap = 0; tap < 9; ++tap) {
      if (!reaches(tap / 3, down, y, tiling.height)) continue;
      float w[4];
      read_quad(taps + tap * Z::kSlice + group * kGroup + threadIdx.x % 4 * 4, w);
      MGHF_UNROLL_ALL
      for (int pixel = 0; pixel < 2; ++pixel) {
        const bool counts = reaches(tap % 3, across, x + pixel, tiling.width);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          if (counts) sum.at(pixel, q) += w[q] * quad[pixel][q];
        }
      }
    }
  }
}

// result += E^T (A' D^T through) at this warp's rows of the tile, for its part of the slice.
template <class Z, class T>
__device__ __forceinline__ void go_through_expand(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                                  const Tile<T, Z::kSlice>& through,
                                                  const Tile<T, Z::kSlice>& hidden,
                                                  const float* taps, const BackwardStage<T>& s,
                                                  const SubnetWeights& w, int slice,
                                                  const TileOrigin& place) {
  constexpr int kSlices = Z::kSlice / kGroup, kOwn = kSlices / Z::kParts;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int row = warp % Z::kWarpsOfPart * Z::kRowsOfWarp;
  const int first = row * Z::kInnerAcross + 2 * g, own = (row + 2) * Z::kAcross + 2 * g + 2;
  const bool at_border = place.y < 2 || place.x < 2 || place.y + Z::kRows + 2 > s.tiling.height ||
                         place.x + kColumns + 2 > s.tiling.width;
  MGHF_UNROLL(1)
  for (int j = 0; j < kOwn; ++j) {
    const int group = warp / Z::kWarpsOfPart * kOwn + j;
    Values back[Z::kRowsOfWarp] = {};
    if (at_border) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < Z::kRowsOfWarp; ++i) {
        transposed_at_border<Z>(back[i], through, taps, group, first + i * Z::kInnerAcross,
                                s.tiling, place.y + row + i, place.x + 2 * g);
      }
    } else {
      depthwise<Z::kInnerAcross, true>(back, through, taps, group, first);
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < Z::kRowsOfWarp; ++i) {
      Values value = hidden.block(own + i * Z::kAcross, group);
      go_back_from_value<kValues>(back[i].all(), value.all(), s.activation);
    }
    multiply_add<Fast<T>>(result, back, w.expand_transposed,
                          (slice * kSlices + group) * Z::kGroups);
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 1) backward_stage(BackwardStage<T> s) {
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  const Tile<T, Z::kHalf> features{reinterpret_cast<T*>(memory)};
  const Tile<T, Z::kHalf> gradients{features.data + Z::kFeatures};
  const Tile<T, Z::kSlice> hidden{gradients.data + Z::kGradients};
  const Tile<T, Z::kSlice> through{hidden.data + Z::kHidden};
  float* const taps = reinterpret_cast<float*>(through.data + Z::kThrough);
  const TileOrigin place(s.tiling, blockIdx.x);
  copy_tile<Z::kThreads, Z::kRows + 4, Z::kAcross>(features, s.features, s.tiling, place.b,
                                                   place.y - 2, place.x - 2);
  const int part = threadIdx.x / kWarp / Z::kWarpsOfPart;
  Values result[Z::kGroups][Z::kRowsOfWarp] = {};
  MGHF_UNROLL(1)
  for (int i = 0; i < s.count; ++i) {
    const SubnetWeights& w = s.subnets[i];
    copy_tile<Z::kThreads, Z::kRows + 2, Z::kInnerAcross>(gradients, s.gradients[i], s.tiling,
                                                          place.b, place.y - 1, place.x - 1);
    end_copies();
    wait_for_copies<0>();
    __syncthreads();
    MGHF_UNROLL(1)
    for (int slice = 0; slice * Z::kSlice < s.hidden; ++slice) {
      read_taps<Z::kThreads, Z::kSlice>(taps, w.depthwise, slice, s.hidden);
      expand<Exact<T>, Z::kPixels, Z::kWarps>(hidden, features, w.expand, slice, s.activation);
      __syncthreads();
      go_through_project<Z>(through, gradients, hidden, taps, s, w, slice, place);
      __syncthreads();
      if (part < Z::kParts) {
        go_through_expand<Z>(result, through, hidden, taps, s, w, slice, place);
      }
      __syncthreads();
    }
  }
  for_own_pixels<Z, Z::kParts>(
      result, reinterpret_cast<float4*>(memory), s.tiling, place,
      [&](int y, int x, int64_t pixel, float (&sums)[Z::kGroups][4]) {
        float direct[Z::kGroups][4];
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kGroups; ++n) s.direct.read(place.b, y, x, n, direct[n]);
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kGroups; ++n) {
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) sums[n][q] += direct[n][q];
          write_quad(s.result.quad(pixel, n), sums[n]);
        }
      });
}

}  // namespace

}  // namespace mghf::cuda
