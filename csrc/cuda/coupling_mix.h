// The kernels of `coupling` other than the sub-networks': packing weights, mixing the channels of
// pixels, copying an image.
#pragma once

#include "coupling_geometry.h"

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

  __host__ __device__ int64_t blocks() const {
    int64_t blocks = 0;
    for (int i = 0; i < count; ++i) blocks += matrices[i].blocks();
    return blocks;
  }
};

template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_weights(Packing packing) {
  if (blockIdx.x == 0) {
    for (int64_t i = threadIdx.x; i < packing.bias_axis.halves * packing.bias_axis.padded;
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
  const uint4* weights;
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
    multiply_add_outside<P>(sum, values, m.weights, start * groups + first_group,
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

// The gradient of x from the products of each pixel with all terms of a 3x3 mix: every pixel sums
// the products of its neighbours with the taps that reach it.
constexpr int kGatherThreads = 256;

template <class T>
__global__ void __launch_bounds__(kGatherThreads)
    gather(const float* products, MutableImage<T> grad_x, Rows kept, Rows computed) {
  const int64_t height = grad_x.height, width = grad_x.width, channels = grad_x.channels;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kGatherThreads + threadIdx.x;
  if (i >= grad_x.batch * channels * computed.count() * width) return;
  const int64_t x = i % width, y = computed.first + i / width % computed.count();
  const int64_t c = i / width / computed.count() % channels;
  const int64_t b = i / width / computed.count() / channels;
  float sum = 0;
  for (int tap = 0; tap < 9; ++tap) {
    const int64_t to_y = y + 1 - tap / 3, to_x = x + 1 - tap % 3;
    if (to_y < 0 || to_y >= height || to_x < 0 || to_x >= width) continue;
    const int64_t pixel = (b * kept.count() + to_y - kept.first) * width + to_x;
    sum += products[pixel * channels * 9 + c * 9 + tap];
  }
  grad_x.pixel(b, y, x)[c * grad_x.channel_stride] = from_float<T>(sum);
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
