// The kernels of `coupling` other than the sub-networks': packing weights, mixing the channels of
// pixels and back, copying an image.
#pragma once

#include "coupling_geometry.h"
#include "coupling_rows_weights.h"

namespace mghf::cuda {

namespace {

// ---- packing ----

constexpr int kMostMatrices = 14;
constexpr int kPackThreads = 128;

struct Packing {
  Matrix matrices[kMostMatrices];
  int count;
  const float* bias;
  float* padded_bias;
  Axis bias_axis;
  RowsPacking rows;  // packed by the blocks after the others

  __host__ __device__ int64_t blocks() const {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += matrices[i].blocks();
    return (blocks * kWarp + kPackThreads - 1) / kPackThreads;
  }
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_weights(Packing packing) {
  if (blockIdx.x >= packing.blocks()) {
    pack_rows<kPackThreads>(packing.rows, static_cast<int>(blockIdx.x - packing.blocks()));
    return;
  }
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < packing.bias_axis.pieces * packing.bias_axis.padded;
         i += kPackThreads) {
      const int64_t at = packing.bias_axis.offset(i);
      packing.padded_bias[i] = at >= 0 ? packing.bias[at] : 0.0f;
    }
  }
  int64_t block = blockIdx.x * int64_t{kPackThreads / kWarp} + threadIdx.x / kWarp;
  for (int i = 0; i < packing.count; ++i) {
    const Matrix& matrix = packing.matrices[i];
    if (block >= 0 && block < matrix.blocks()) {
      if (matrix.fast) {
        pack_block<Fast<T>>(matrix, block);
      } else {
        pack_block<Exact<T>>(matrix, block);
      }
    }
    block -= matrix.blocks();
  }
}

// ---- the mix ----

constexpr int kMixThreads = 128;
constexpr int kMixPixels = 64;    // of a block
constexpr int kMixColumns = 128;  // results of a pixel in a block

// result = W x, plus bias if there is one. x: images with `terms` factors for a pixel, in the order
// of W: channel, then, with a 3x3 kernel, tap.
template <class T, class Result>
struct Mix {
  Channels<T> x;
  MutableChannels<Result> result;
  Packed weights;
  int groups;  // of columns of W: all or the first ones are computed
  const float* bias;
  int pixels, height, width;  // pixels in all; size of each image's part
  int first_row;              // of x
  int terms;
};

struct MixPixel {
  int b, y, x;

  __device__ MixPixel(int pixel, int height, int width)
      : b(pixel / width / height), y(pixel / width % height), x(pixel % width) {}
};

// Reads quads of terms of a pixel; zeros beyond the last pixel.
template <class T, int kKernel>
struct MixSource;

template <class T>
struct MixSource<T, 1> {
  const T* at = nullptr;

  template <class Result>
  __device__ MixSource(const Mix<T, Result>& m, int pixel) {
    const Image<T>& i = m.x.image;
    const MixPixel p(pixel, m.height, m.width);
    if (pixel < m.pixels) {
      at = i.map(p.b, 0) + (p.y + m.first_row) * i.row_stride + p.x * i.column_stride;
    }
  }
  template <class Result>
  __device__ void read(const Mix<T, Result>& m, int group, float (&to)[4]) const {
    if (at != nullptr) return m.x.read(at, group, to);
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) to[i] = 0;
  }
};

template <class T>
struct MixSource<T, 3> {
  const T* at = nullptr;
  unsigned known = 0;  // bit by bit the taps within the image

  template <class Result>
  __device__ MixSource(const Mix<T, Result>& m, int pixel) {
    const Image<T>& i = m.x.image;
    if (pixel >= m.pixels) return;
    MixPixel p(pixel, m.height, m.width);
    p.y += m.first_row;
    at = i.map(p.b, 0) + p.y * i.row_stride + p.x * i.column_stride;
    for (int tap = 0; tap < 9; ++tap) {
      const int y = p.y + tap / 3 - 1, x = p.x + tap % 3 - 1;
      if (y >= 0 && y < i.height && x >= 0 && x < i.width) known |= 1u << tap;
    }
  }
  template <class Result>
  __device__ void read(const Mix<T, Result>& m, int group, float (&to)[4]) const {
    const Image<T>& image = m.x.image;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      const int term = group * kGroup + static_cast<int>(threadIdx.x) % 4 * 4 + i, tap = term % 9;
      const int64_t offset = term / 9 * image.channel_stride +
                             (tap / 3 - 1) * image.row_stride + (tap % 3 - 1) * image.column_stride;
      to[i] = term < m.terms && (known >> tap & 1) != 0 ? to_float(at[offset]) : 0.0f;
    }
  }
};

// Two warps share the pixels, two the results.
template <class T, class Result, class P, int kKernel>
__global__ void __launch_bounds__(kMixThreads, kKernel == 1 ? 3 : 2) mix(Mix<T, Result> m) {
  constexpr int kOwn = kMixColumns / kGroup / 2;
  alignas(16) __shared__ T terms[kMixPixels * kGroup];
  const Tile<T, kGroup> tile{terms};
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const unsigned blocks_of_columns = (m.result.count + kMixColumns - 1) / kMixColumns;
  const int first = static_cast<int>(blockIdx.x / blocks_of_columns) * kMixPixels;
  const int first_group = static_cast<int>(blockIdx.x % blocks_of_columns) * 2 * kOwn +
                          warp / 2 * kOwn;
  const int groups = (m.result.count + kGroup - 1) / kGroup;
  const int depths = (m.terms + kGroup - 1) / kGroup;
  const MixSource<T, kKernel> from[2] = {{m, first + warp * 8 + g}, {m, first + 32 + warp * 8 + g}};
  float next[2][4];
  const auto read = [&](int group) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) from[i].read(m, group, next[i]);
  };
  Values sum[kOwn][2] = {};
  read(0);
  MGHF_UNROLL(1)
  for (int start = 0; start < depths; ++start) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) tile.write(i * 32 + warp * 8 + g, 0, next[i]);
    __syncthreads();
    if (start + 1 < depths) read(start + 1);
    Values values[2];
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      values[i] = tile.block((warp % 2 * 2 + i) * kGroup + 2 * g, 0);
    }
    multiply_add_outside<P>(sum, values, m.weights, start * m.groups + first_group,
                            groups - first_group);
    __syncthreads();
  }
  const int first_pixel = first + opaque(warp % 2 * 2 * kGroup + 2 * g);
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    MGHF_UNROLL_ALL
    for (int row = 0; row < 2; ++row) {
      const int pixel = first_pixel + i * kGroup + row;
      if (pixel >= m.pixels) continue;
      const MixPixel to(pixel, m.height, m.width);
      MGHF_UNROLL_ALL
      for (int n = 0; n < kOwn; ++n) {
        const int group = first_group + n;
        if (group >= groups) continue;
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = sum[n][i].at(row, q);
        if (m.bias != nullptr) {
          const float* const bias = m.bias + group * kGroup + threadIdx.x % 4 * 4;
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) quad[q] += bias[q];
        }
        m.result.write(to.b, to.y, to.x, group, quad);
      }
    }
  }
}

// ---- the transposed 3x3 mix ----

// The gradient of x: every pixel sums the products of its neighbours with the taps that reach it. A
// block makes those of some channels for its tile and a halo of one in shared memory. The weights'
// columns are these channels' taps, padded.
constexpr int kUnmixRows = 8, kUnmixWarps = 4, kUnmixThreads = kUnmixWarps * kWarp;
constexpr int kTaps = 9;
constexpr int kUnmixChannels = 3;  // at a time
constexpr int kUnmixColumns = 2 * kGroup;
static_assert(kUnmixChannels * kTaps <= kUnmixColumns);

template <class T>
struct Unmix {
  Tiling tiling;  // with kUnmixRows
  Features<T> d;
  int depths;  // groups of d
  Packed weights;
  MutableImage<T> grad_x;
};

template <class T>
__global__ void __launch_bounds__(kUnmixThreads, 4) unmix_taps(Unmix<T> m) {
  constexpr int kAcross = kColumns + 2, kPixels = (kUnmixRows + 2) * kAcross;
  constexpr int kGroups = kUnmixColumns / kGroup, kStride = kUnmixColumns + 1;  // spreads banks
  constexpr int kBlocks = (kPixels + kGroup - 1) / kGroup;
  constexpr int kOwn = (kBlocks + kUnmixWarps - 1) / kUnmixWarps;
  __shared__ float products[kPixels * kStride];
  const TileOrigin place(m.tiling, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int channels = static_cast<int>(m.grad_x.channels);
  const int chunks = (channels + kUnmixChannels - 1) / kUnmixChannels;
  const auto first_pixel = [&](int i) {
    return (static_cast<int>(threadIdx.x) / kWarp + i * kUnmixWarps) * kGroup + lane / 4 * 2;
  };
  int64_t from[kOwn][2];
  MGHF_UNROLL_ALL
  for (int i = 0; i < kOwn; ++i) {
    MGHF_UNROLL_ALL
    for (int of = 0; of < 2; ++of) {
      // A pixel that does not exist gives products that nobody reads.
      const int pixel = first_pixel(i) + of;
      int y = place.y + pixel / kAcross - 1, x = place.x + pixel % kAcross - 1;
      y = y < m.tiling.kept.end ? y : m.tiling.kept.end - 1;
      x = x < m.tiling.width ? x : m.tiling.width - 1;
      from[i][of] = m.tiling.pixel(place.b, y > m.tiling.kept.first ? y : m.tiling.kept.first,
                                   x > 0 ? x : 0);
    }
  }
  MGHF_UNROLL(1)
  for (int chunk = 0; chunk < chunks; ++chunk) {
    Values sum[kGroups][kOwn] = {};
    MGHF_UNROLL(1)
    for (int k = 0; k < m.depths; ++k) {
      Values values[kOwn];
      MGHF_UNROLL_ALL
      for (int i = 0; i < kOwn; ++i) {
        MGHF_UNROLL_ALL
        for (int of = 0; of < 2; ++of) {
          float quad[4];
          read_quad(m.d.quad(from[i][of], k), quad);
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) values[i].at(of, q) = quad[q];
        }
      }
      multiply_add<Fast<T>>(sum, values, m.weights, (k * chunks + chunk) * kGroups);
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < kOwn; ++i) {
      MGHF_UNROLL_ALL
      for (int of = 0; of < 2; ++of) {
        const int pixel = first_pixel(i) + of;
        if (pixel >= kPixels) continue;
        MGHF_UNROLL_ALL
        for (int n = 0; n < kGroups; ++n) {
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            products[pixel * kStride + n * kGroup + lane % 4 * 4 + q] = sum[n][i].at(of, q);
          }
        }
      }
    }
    __syncthreads();
    constexpr int kResults = kUnmixRows * kColumns;
    for (int i = threadIdx.x; i < kResults * kUnmixChannels; i += kUnmixThreads) {
      const int own = i % kResults, row = own / kColumns, column = own % kColumns;
      const int of = i / kResults, c = chunk * kUnmixChannels + of;
      const int y = place.y + row, x = place.x + column;
      if (c >= channels || !m.tiling.computes(y, x)) continue;
      float total = 0;
      MGHF_UNROLL_ALL
      for (int tap = 0; tap < kTaps; ++tap) {
        const int down = 1 - tap / 3, across = 1 - tap % 3;
        if (!m.tiling.holds(y + down, x + across)) continue;
        const int pixel = (row + 1 + down) * kAcross + column + 1 + across;
        total += products[pixel * kStride + of * kTaps + tap];
      }
      m.grad_x.pixel(place.b, y, x)[c * m.grad_x.channel_stride] = from_float<T>(total);
    }
    __syncthreads();
  }
}

// ---- features of an image ----

constexpr int kCopyThreads = 256;

// The halves of an image's channels, each padded with zeros to `padded`, as features. A warp copies
// some channels of neighbouring pixels if these are contiguous, else all channels of a pixel.
template <class T>
__global__ void __launch_bounds__(kCopyThreads)
    copy_features(Image<T> y, Features<float> to, int64_t padded, bool by_maps, Rows kept) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x;
  const int64_t pixels = kept.count() * y.width, width = 2 * padded, half = y.channels / 2;
  if (i >= y.batch * pixels * width) return;
  const int64_t b = i / (pixels * width), j = i % (pixels * width);
  const int64_t p = by_maps ? j % pixels : j / width, place = by_maps ? j / pixels : j % width;
  const int64_t c = place % padded;
  float value = 0;
  if (c < half) {
    value = to_float(y.map(b, place / padded * half + c)[(kept.first + p / y.width) * y.row_stride +
                                                         p % y.width * y.column_stride]);
  }
  to.data[(b * pixels + p) * width + place] = value;
}

}  // namespace

}  // namespace mghf::cuda
