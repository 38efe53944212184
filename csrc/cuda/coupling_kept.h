// The sub-networks' kernels for the gradient where the forward has kept exp(r) and the slopes; see
// coupling.cu.
#pragma once

#include "coupling_backward.h"
#include "coupling_state.h"

namespace mghf::cuda {

namespace {

// Outer: d2 = g2 + rho^T(d_r) + eta^T(g1), with d_r made while it is read. Inner: d1 = g1 exp(r) +
// phi^T(d2), and for a 1x1 mix at once the gradient of x, M^T (d1, d2).
template <class T>
struct KeptStage {
  Tiling tiling;
  int hidden;
  Activation activation;
  float clamp;
  SubnetWeights subnets[2];  // rho and eta, or phi
  State state;
  Channels<T> g1;
  Channels<T> g2;                 // outer
  Features<T> z1;                 // outer; z1.data is null where the state has it
  Features<T> d2;
  Features<T> d1;                 // inner, for a 3x3 mix
  Packed mix_transposed;          // inner, for a 1x1 mix, else null
  MutableChannels<T> grad_x;      // likewise
};

// A block's tile is kRows by kColumns pixels; a warp has kRowsOfWarp rows.
template <class T, bool kOuterOf, int kHalfOf, int kRowsOf, int kRowsOfWarpOf, int kSliceOf,
          int kBlocksOf>
struct KeptSizes {
  static constexpr bool kOuter = kOuterOf;
  static constexpr int kHalf = kHalfOf, kRows = kRowsOf, kRowsOfWarp = kRowsOfWarpOf;
  static constexpr int kSlice = kSliceOf, kWarps = kRows / kRowsOfWarp, kThreads = kWarps * kWarp;
  static constexpr int kBlocks = kBlocksOf;  // on a multiprocessor, by registers
  static constexpr int kGroups = kHalf / kGroup;
  static constexpr int kInnerAcross = kColumns + 2, kInnerPixels = (kRows + 2) * kInnerAcross;
  static constexpr int kGradients = Tile<T, kHalf>::size(kInnerPixels);  // elements
  static constexpr int kThrough = Tile<T, kSlice>::size(kInnerPixels);
  static constexpr size_t kBytes = (kGradients + kThrough) * sizeof(T) + 9 * kSlice * 4 +
                                   kInnerPixels * Slopes<kHalf>::kBytes;
};

// Where a thread is in the tile: its warp's first row and its first column.
template <class Z>
struct OwnPlace {
  int row = opaque(static_cast<int>(threadIdx.x)) / kWarp * Z::kRowsOfWarp;
  int column = opaque(static_cast<int>(threadIdx.x)) % kWarp / 4 * 2;

  // The index in the tile with its halo, of the i-th row's first pixel.
  __device__ __forceinline__ int pixel(int i) const {
    return (row + i + 1) * Z::kInnerAcross + column + 1;
  }
};

// Fills the tile with d_r, or with g1 if not `of_rho`; zeros outside of the image.
template <class Z, class T>
__device__ __forceinline__ void read_gradients(const Tile<T, Z::kHalf>& gradients,
                                               const KeptStage<T>& s, const TileOrigin& place,
                                               bool of_rho) {
  // Neighbouring threads have neighbouring pixels, which may be contiguous.
  MGHF_UNROLL(1)
  for (int i = threadIdx.x / 4; i < Z::kInnerPixels * Z::kGroups; i += Z::kThreads / 4) {
    const int pixel = i % Z::kInnerPixels, n = i / Z::kInnerPixels;
    const int y = place.y + pixel / Z::kInnerAcross - 1, x = place.x + pixel % Z::kInnerAcross - 1;
    float g[4] = {};
    // Rows of z1 beyond the kept ones are only read for results that nobody uses.
    const bool known = s.tiling.holds(y, x) && (s.z1.data == nullptr || (y >= s.tiling.kept.first &&
                                                                         y < s.tiling.kept.end));
    if (known) {
      s.g1.read(place.b, y, x, n, g);
      if (of_rho) {
        const unsigned char* const kept = s.state.pixel(place.b, y, x);
        float scale[4], z1[4];
        read_quad(State::scale<T>(kept, n), scale);
        read_quad(s.z1.data != nullptr ? s.z1.quad(s.tiling.pixel(place.b, y, x), n)
                                       : s.state.template z1<T>(kept, n),
                  z1);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          g[q] = g[q] * scale[q] * z1[q];
          if (s.clamp > 0) {
            // Within the clamp's range also where exp(r) was rounded, to zero or out of it.
            const float r = fminf(fmaxf(logf(scale[q]), -s.clamp), s.clamp) / s.clamp;
            g[q] *= 1.0f - r * r;
          }
        }
      }
    }
    gradients.write(pixel, n, g);
  }
}

// Copies the bits of a sub-network for all pixels of the tile, without ending the group of copies.
template <class Z, class T>
__device__ __forceinline__ void copy_slopes(const Slopes<Z::kHalf>& slopes, const KeptStage<T>& s,
                                            const TileOrigin& place, int subnet) {
  constexpr int kCopies = Slopes<Z::kHalf>::kCopies;
  for (int i = threadIdx.x; i < Z::kInnerPixels * kCopies; i += Z::kThreads) {
    const int pixel = i / kCopies, part = i % kCopies;
    const int y = place.y + pixel / Z::kInnerAcross - 1, x = place.x + pixel % Z::kInnerAcross - 1;
    const bool inside = s.tiling.holds(y, x);
    const unsigned char* const kept =
        s.state.pixel(inside ? place.b : 0, inside ? y : 0, inside ? x : 0);
    copy_async<16>(slopes.copy(pixel, part), s.state.template slopes<T>(kept, subnet) + part * 16,
                   inside ? 16 : 0);
  }
}

// A' P^T g at all pixels of the tile; zeros outside of the image.
template <class Z, class T>
__device__ __forceinline__ void project_back(const Tile<T, Z::kSlice>& through,
                                             const Tile<T, Z::kHalf>& gradients,
                                             const Slopes<Z::kHalf>& slopes,
                                             const KeptStage<T>& s, const SubnetWeights& w,
                                             int slice, const TileOrigin& place) {
  using S = Share<Z::kInnerPixels, Z::kSlice, Z::kWarps>;
  constexpr int kSlices = Z::kSlice / kGroup;
  const S share;
  Values sum[S::kGroups][S::kRows] = {};
  multiply_tile<Fast<T>, S, Z::kInnerPixels>(sum, share, gradients, w.project_transposed,
                                             slice * kSlices);
  const float flat = flat_slope(s.activation);
  MGHF_UNROLL_ALL
  for (int i = 0; i < S::kRows; ++i) {
    MGHF_UNROLL_ALL
    for (int of = 0; of < 2; ++of) {
      const int pixel = share.pixel(i) + of;
      if (pixel >= Z::kInnerPixels) continue;
      const bool inside = s.tiling.holds(place.y + pixel / Z::kInnerAcross - 1,
                                         place.x + pixel % Z::kInnerAcross - 1);
      MGHF_UNROLL_ALL
      for (int n = 0; n < S::kGroups; ++n) {
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = sum[n][i].at(of, q);
        slopes.go_back(quad, pixel, 1, slice * kSlices + share.first_group + n, flat);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = inside ? quad[q] : 0.0f;
        through.write(pixel, share.first_group + n, quad);
      }
    }
  }
}

// result += E^T (A' D^T through) at this warp's rows of the tile.
template <class Z, class T>
__device__ __forceinline__ void expand_back(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                            const Tile<T, Z::kSlice>& through, const float* taps,
                                            const Slopes<Z::kHalf>& slopes, const KeptStage<T>& s,
                                            const SubnetWeights& w, int slice,
                                            const TileOrigin& place) {
  constexpr int kSlices = Z::kSlice / kGroup;
  const OwnPlace<Z> own;
  const int first = own.row * Z::kInnerAcross + own.column;
  const bool at_border = place.y < 2 || place.x < 2 || place.y + Z::kRows + 2 > s.tiling.height ||
                         place.x + kColumns + 2 > s.tiling.width;
  const float flat = flat_slope(s.activation);
  MGHF_UNROLL(1)
  for (int group = 0; group < kSlices; ++group) {
    Values back[Z::kRowsOfWarp] = {};
    if (at_border) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < Z::kRowsOfWarp; ++i) {
        transposed_at_border<Z>(back[i], through, taps, group, first + i * Z::kInnerAcross,
                                s.tiling, place.y + own.row + i, place.x + own.column);
      }
    } else {
      depthwise<Z::kInnerAcross, true>(back, through, taps, group, first);
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < Z::kRowsOfWarp; ++i) {
      MGHF_UNROLL_ALL
      for (int of = 0; of < 2; ++of) {
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = back[i].at(of, q);
        slopes.go_back(quad, own.pixel(i) + of, 0, slice * kSlices + group, flat);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) back[i].at(of, q) = quad[q];
      }
    }
    multiply_add<Fast<T>>(result, back, w.expand_transposed,
                          (slice * kSlices + group) * Z::kGroups);
  }
}

// Calls f(row i of the warp, pixel 0 or 1 of a thread's, y, x) for the pixels within the image.
template <class Z, class F>
__device__ __forceinline__ void for_pixels_in_registers(const Tiling& tiling,
                                                        const TileOrigin& place, const F& f) {
  const OwnPlace<Z> own;
  MGHF_UNROLL_ALL
  for (int i = 0; i < Z::kRowsOfWarp; ++i) {
    MGHF_UNROLL_ALL
    for (int of = 0; of < 2; ++of) {
      const int y = place.y + own.row + i, x = place.x + own.column + of;
      if (tiling.computes(y, x)) f(i, of, y, x);
    }
  }
}

// M^T (d1, d2) at this warp's rows: d1 is in registers, in the order of a factor, d2 in the tile.
template <class Z, class T>
__device__ __forceinline__ void unmix(Values (&d1)[Z::kGroups][Z::kRowsOfWarp],
                                      const Tile<T, Z::kHalf>& d2, const KeptStage<T>& s) {
  constexpr int kSome = 2;  // groups of results at a time, for which there are registers
  const int groups = (s.grad_x.count + kGroup - 1) / kGroup;
  MGHF_UNROLL(1)
  for (int first = 0; first < groups; first += kSome) {
    const OwnPlace<Z> own;
    const TileOrigin place(s.tiling, opaque(blockIdx.x));
    Values sum[kSome][Z::kRowsOfWarp] = {};
    MGHF_UNROLL_ALL
    for (int k = 0; k < Z::kGroups; ++k) {
      multiply_add<Fast<T>>(sum, d1[k], s.mix_transposed, k * groups + first, groups - first);
    }
    MGHF_UNROLL(1)
    for (int k = 0; k < Z::kGroups; ++k) {
      Values values[Z::kRowsOfWarp];
      MGHF_UNROLL_ALL
      for (int i = 0; i < Z::kRowsOfWarp; ++i) values[i] = d2.block(own.pixel(i), k);
      multiply_add<Fast<T>>(sum, values, s.mix_transposed, (Z::kGroups + k) * groups + first,
                            groups - first);
    }
    for_pixels_in_registers<Z>(s.tiling, place, [&](int i, int of, int y, int x) {
      MGHF_UNROLL_ALL
      for (int n = 0; n < kSome; ++n) {
        if (first + n >= groups) continue;
        const float quad[4] = {sum[n][i].at(of, 0), sum[n][i].at(of, 1), sum[n][i].at(of, 2),
                               sum[n][i].at(of, 3)};
        s.grad_x.write(place.b, y, x, first + n, quad);
      }
    });
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, Z::kBlocks) kept_stage(KeptStage<T> s) {
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  const Tile<T, Z::kHalf> gradients{reinterpret_cast<T*>(memory)};
  const Tile<T, Z::kSlice> through{gradients.data + Z::kGradients};
  float* const taps = reinterpret_cast<float*>(through.data + Z::kThrough);
  const Slopes<Z::kHalf> slopes{reinterpret_cast<uint16_t*>(taps + 9 * Z::kSlice)};
  Values result[Z::kGroups][Z::kRowsOfWarp] = {};
  MGHF_UNROLL(1)
  for (int i = 0; i < (Z::kOuter ? 2 : 1); ++i) {
    const SubnetWeights& w = s.subnets[i];
    {
      const TileOrigin place(s.tiling, opaque(blockIdx.x));
      copy_slopes<Z>(slopes, s, place, Z::kOuter ? kRho + i : kPhi);
      if constexpr (Z::kOuter) {
        read_gradients<Z>(gradients, s, place, i == 0);
      } else {
        copy_tile<Z::kThreads, Z::kRows + 2, Z::kInnerAcross>(gradients, s.d2, s.tiling, place.b,
                                                              place.y - 1, place.x - 1);
      }
    }
    end_copies();
    wait_for_copies<0>();
    __syncthreads();
    MGHF_UNROLL(1)
    for (int slice = 0; slice * Z::kSlice < s.hidden; ++slice) {
      const TileOrigin place(s.tiling, opaque(blockIdx.x));
      read_taps<Z::kThreads, Z::kSlice>(taps, w.depthwise, slice, s.hidden);
      project_back<Z>(through, gradients, slopes, s, w, slice, place);
      __syncthreads();
      expand_back<Z>(result, through, taps, slopes, s, w, slice, place);
      __syncthreads();
    }
  }
  const TileOrigin place(s.tiling, opaque(blockIdx.x));
  for_pixels_in_registers<Z>(s.tiling, place, [&](int i, int of, int y, int x) {
    const int64_t pixel = s.tiling.pixel(place.b, y, x);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      float direct[4];
      if constexpr (Z::kOuter) {
        s.g2.read(place.b, y, x, n, direct);
      } else {
        float scale[4];
        s.g1.read(place.b, y, x, n, direct);
        read_quad(State::scale<T>(s.state.pixel(place.b, y, x), n), scale);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) direct[q] *= scale[q];
      }
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        result[n][i].at(of, q) += direct[q];
        direct[q] = result[n][i].at(of, q);
      }
      if constexpr (Z::kOuter) {
        write_quad(s.d2.quad(pixel, n), direct);
      } else if (s.mix_transposed.at == nullptr) {
        write_quad(s.d1.quad(pixel, n), direct);
      }
    }
  });
  if constexpr (!Z::kOuter) {
    if (s.mix_transposed.at != nullptr) unmix<Z>(result, gradients, s);
  }
}

}  // namespace

}  // namespace mghf::cuda
