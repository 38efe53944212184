// Shared by the sub-networks' kernels of `coupling`, forward and backward.
#pragma once

#include "coupling_geometry.h"
#include "coupling_pointwise.h"

namespace mghf::cuda {

namespace {

struct SubnetWeights {
  Packed expand, project;
  Packed expand_transposed, project_transposed;  // for the gradient
  const float* depthwise;                        // as given
  const unsigned char* rows;                     // for coupling_rows.h, or null
  const unsigned char* rows_gradient;            // for coupling_rows_gradient.h, or null
};

// Copies features into a tile that begins at (y, x), halo included, without ending the group of
// copies.
template <int kThreads, int kDown, int kAcross, class T, int kChannels>
__device__ __forceinline__ void copy_tile(const Tile<T, kChannels>& tile, const Features<T>& from,
                                          const Tiling& tiling, int b, int y, int x) {
  constexpr int kOfCopy = 16 / static_cast<int>(sizeof(T)), kCopies = kChannels / kOfCopy;
  for (int i = threadIdx.x; i < kDown * kAcross * kCopies; i += kThreads) {
    const int pixel = i / kCopies, channel = i % kCopies * kOfCopy;
    // Rows beyond the kept ones are only read for results that nobody uses.
    const int row = reflected(y + pixel / kAcross, tiling.height);
    const int known = row < tiling.kept.end ? row : tiling.kept.end - 1;
    const int64_t source = tiling.pixel(b, known < tiling.kept.first ? tiling.kept.first : known,
                                        reflected(x + pixel % kAcross, tiling.width));
    copy_async<16>(tile.group(pixel, channel / kGroup) + channel % kGroup,
                   from.data + source * from.width + channel);
  }
}

// The 3x3 weights of a slice, [tap][channel].
template <int kThreads, int kSlice>
__device__ __forceinline__ void read_taps(float* taps, const float* depthwise, int slice,
                                          int hidden) {
  for (int i = threadIdx.x; i < 9 * kSlice; i += kThreads) {
    const int channel = slice * kSlice + i % kSlice;
    taps[i] = channel < hidden ? depthwise[channel * 9 + i / kSlice] : 0.0f;
  }
}

// How warps share a tile of kPixels by kSlice results: all rows of pixels, some of the groups.
template <int kPixels, int kSlice, int kWarps>
struct Share {
  static constexpr int kSlices = kWarps >= 8 ? kSlice / kGroup : 1;
  static constexpr int kDown = kWarps / kSlices;
  static constexpr int kTiles = (kPixels + kGroup - 1) / kGroup;
  static constexpr int kRows = (kTiles + kDown - 1) / kDown;  // blocks of a warp
  static constexpr int kGroups = kSlice / kGroup / kSlices;
  int first_group = static_cast<int>(threadIdx.x) / kWarp % kSlices * kGroups;

  // The first pixel of a thread in the i-th block of its warp; maybe beyond the last.
  __device__ __forceinline__ int pixel(int i) const {
    const int block = static_cast<int>(threadIdx.x) / kWarp / kSlices + i * kDown;
    return block * kGroup + static_cast<int>(threadIdx.x) % kWarp / 4 * 2;
  }
};

// sum = a tile of pixels times this warp's part of a slice of a packed matrix.
template <class P, class S, int kPixels, class T, int kChannels>
__device__ __forceinline__ void multiply_tile(Values (&sum)[S::kGroups][S::kRows], const S& share,
                                              const Tile<T, kChannels>& tile, const Packed& weights,
                                              int first_group) {
  constexpr int kAllGroups = 2 * kChannels / kGroup;  // of the matrix: those of a hidden layer
  MGHF_UNROLL(1)
  for (int k = 0; k < kChannels / kGroup; ++k) {
    Values values[S::kRows];
    MGHF_UNROLL_ALL
    for (int i = 0; i < S::kRows; ++i) {
      const int pixel = share.pixel(i);
      values[i] = tile.block(pixel < kPixels ? pixel : kPixels - 2, k);
    }
    multiply_add<P>(sum, values, weights, k * kAllGroups + first_group + share.first_group);
  }
}

// For callers of `expand` that want A(E f) only.
struct NoNote {
  __device__ __forceinline__ void operator()(int, int, Values&) const {}
};

// The slice of A(E f) for all pixels of a tile. Every thread of a warp calls note(pixel, group of
// the slice, its part of E f) with its first pixel, which may be beyond the last.
template <class P, int kPixels, int kWarps, class T, int kChannels, int kSlice,
          class Note = NoNote>
__device__ __forceinline__ void expand(const Tile<T, kSlice>& hidden,
                                       const Tile<T, kChannels>& features, const Packed& weights,
                                       int slice, Activation activation,
                                       const Note& note = Note{}) {
  using S = Share<kPixels, kSlice, kWarps>;
  const S share;
  Values sum[S::kGroups][S::kRows] = {};
  multiply_tile<P, S, kPixels>(sum, share, features, weights, slice * (kSlice / kGroup));
  MGHF_UNROLL_ALL
  for (int n = 0; n < S::kGroups; ++n) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < S::kRows; ++i) {
      note(share.pixel(i), share.first_group + n, sum[n][i]);
      activate<kValues>(sum[n][i].all(), activation);
      MGHF_UNROLL_ALL
      for (int row = 0; row < 2; ++row) {
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = sum[n][i].at(row, q);
        const int pixel = share.pixel(i) + row;
        if (pixel < kPixels) hidden.write(pixel, share.first_group + n, quad);
      }
    }
  }
}

// The 3x3 layer at a thread's pixels in kRows blocks one below the other, whose windows begin at
// `first` in a tile that is kAcross pixels wide; kFlipped: its transposed, away from the image's
// borders.
template <int kAcross, bool kFlipped, int kRows, class T, int kSlice>
__device__ __forceinline__ void depthwise(Values (&sum)[kRows], const Tile<T, kSlice>& hidden,
                                          const float* taps, int group, int first) {
  float w[9][4];
  MGHF_UNROLL_ALL
  for (int tap = 0; tap < 9; ++tap) {
    read_quad(taps + (kFlipped ? 8 - tap : tap) * kSlice + group * kGroup + threadIdx.x % 4 * 4,
              w[tap]);
  }
  MGHF_UNROLL_ALL
  for (int y = 0; y < kRows + 2; ++y) {
    MGHF_UNROLL_ALL
    for (int x = 0; x < 4; ++x) {
      float quad[4];
      hidden.read(first + y * kAcross + x, group, quad);
      MGHF_UNROLL_ALL
      for (int row = 0; row < kRows; ++row) {
        MGHF_UNROLL_ALL
        for (int pixel = 0; pixel < 2; ++pixel) {
          if (y < row || y > row + 2 || x < pixel || x > pixel + 2) continue;
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            sum[row].at(pixel, q) += w[(y - row) * 3 + x - pixel][q] * quad[q];
          }
        }
      }
    }
  }
}

// The parameters of a sub-network's kernel.
template <class T>
struct Stage {
  Tiling tiling;
  Features<T> features;  // the sub-networks' input
  int half, hidden;      // channels: c and 2 c
  Activation activation;
  float clamp;
  SubnetWeights subnets[2];
};

}  // namespace

}  // namespace mghf::cuda
