// Whole layers of the invertible block in memory, for the gradients of its weights: kernels that
// read one layer and write another, [pixel][channel], float32. See coupling_weights.cu.
#pragma once

#include "coupling_pointwise.h"
#include "image.h"
#include "mma.h"

namespace mghf::cuda {

namespace {

// Some rows of one image, whose layers are in memory, and those of them whose pixels count.
struct Band {
  int height, width;     // of the image
  int first, rows;       // in memory
  int counted, counts;   // the first row that counts, and how many do

  __host__ __device__ int64_t pixels() const { return static_cast<int64_t>(rows) * width; }
  __host__ __device__ int64_t first_counted() const {
    return static_cast<int64_t>(counted - first) * width;
  }
  __host__ __device__ int64_t count() const { return static_cast<int64_t>(counts) * width; }
};

struct Layer {
  float* data;  // the first channel in use
  int width;    // distance of pixels

  __device__ float* at(int64_t pixel, int channel) const { return data + pixel * width + channel; }
};

// ---- products ----

// Factors of a product: number (i, k) of a matrix whose k is summed over. `kAlongSum`: whether
// neighbours in k are contiguous rather than those in i.

// A layer's channels are summed over, for each pixel.
struct OfPixels {
  static constexpr bool kAlongSum = true;
  Layer layer;
  __device__ float operator()(int64_t i, int64_t k) const {
    return *layer.at(i, static_cast<int>(k));
  }
};
// Pixels are summed over, for each channel; pixel 0 is the first that counts.
struct OfChannels {
  static constexpr bool kAlongSum = false;
  Layer layer;
  int64_t first;
  __device__ float operator()(int64_t i, int64_t k) const {
    return *layer.at(first + k, static_cast<int>(i));
  }
};
// A matrix of weights.
struct OfWeights {
  static constexpr bool kAlongSum = true;
  const float* data;
  int64_t row, step;
  __device__ float operator()(int64_t i, int64_t k) const { return data[i * row + k * step]; }
};
// An image under the mix's window: the channel of each tap, 0 outside of the image.
template <class T>
struct Window {
  Image<T> x;
  int64_t b;
  Band band;
  int kernel;

  __device__ float value(int64_t pixel, int64_t term) const {
    const int taps = kernel * kernel, tap = static_cast<int>(term) % taps, reach = kernel / 2;
    const int row = band.first + static_cast<int>(pixel / band.width) + tap / kernel - reach;
    const int column = static_cast<int>(pixel % band.width) + tap % kernel - reach;
    if (row < 0 || row >= band.height || column < 0 || column >= band.width) return 0;
    return to_float(*(x.pixel(b, row, column) + term / taps * x.channel_stride));
  }
};
template <class T>
struct WindowOfPixels {
  static constexpr bool kAlongSum = true;
  Window<T> window;
  __device__ float operator()(int64_t i, int64_t k) const { return window.value(i, k); }
};
template <class T>
struct WindowOfTerms {
  static constexpr bool kAlongSum = false;
  Window<T> window;
  int64_t first;
  __device__ float operator()(int64_t i, int64_t k) const { return window.value(first + k, i); }
};

// What becomes of a product.
enum class Finish { store, add, activate, slope };

// Into a layer: product (i, j) belongs to pixel i, channel j. `values`: those of an activation, at
// whose slope a gradient is taken.
struct IntoLayer {
  Layer to;
  Finish finish;
  Activation activation;
  const float* bias;
  Layer values;

  __device__ void operator()(int, int64_t i, int64_t j, float x) const {
    float* const place = to.at(i, static_cast<int>(j));
    if (bias != nullptr) x += bias[j];
    if (finish == Finish::add) x += *place;
    if (finish == Finish::activate) activate<1>(&x, activation);
    if (finish == Finish::slope) {
      go_back_from_value<1>(&x, values.at(i, static_cast<int>(j)), activation);
    }
    *place = x;
  }
};
// Into the partial sums of a part.
struct IntoPart {
  float* data;
  int64_t part_size, width;

  __device__ void operator()(int part, int64_t i, int64_t j, float x) const {
    data[part * part_size + i * width + j] = x;
  }
};

constexpr int kLayerThreads = 128;
constexpr int kBlockSide = 64;
constexpr int kDepth = 32;  // summed over at a time
constexpr int kPitch = kBlockSide + 8;
constexpr int kResultPitch = kBlockSide + 4;
static_assert(kBlockSide * kResultPitch <= 2 * kDepth * kPitch);

template <class Factor>
__device__ __forceinline__ void stage(float* to, const Factor& factor, int64_t first_i,
                                      int64_t count, int64_t first_k, int64_t end) {
  MGHF_UNROLL(4)
  for (int c = static_cast<int>(threadIdx.x); c < kDepth * kBlockSide; c += kLayerThreads) {
    const int k = Factor::kAlongSum ? c % kDepth : c / kBlockSide;
    const int i = Factor::kAlongSum ? c / kDepth : c % kBlockSide;
    const bool inside = first_i + i < count && first_k + k < end;
    to[k * kPitch + i] = inside ? factor(first_i + i, first_k + k) : 0.0f;
  }
}

// sum over k of left(i, k) right(j, k), as three products of TF32: a block takes 64 x 64 of them
// and a part of the k, `run` long.
template <class Left, class Right, class To>
__global__ void __launch_bounds__(kLayerThreads)
    multiply(Left left, Right right, To to, int64_t rows, int64_t columns, int64_t depth,
             int64_t run) {
  __shared__ float memory[2 * kDepth * kPitch];
  float *const of_left = memory, *const of_right = memory + kDepth * kPitch;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int g = thread % kWarp / 4, t = thread % 4;
  const int64_t across = (columns + kBlockSide - 1) / kBlockSide;
  const int64_t tiles = (rows + kBlockSide - 1) / kBlockSide * across;
  const int64_t tile = blockIdx.x % tiles;
  const int part = static_cast<int>(blockIdx.x / tiles);
  const int64_t first_i = tile / across * kBlockSide, first_j = tile % across * kBlockSide;
  const int64_t begin = part * run, end = begin + run < depth ? begin + run : depth;
  const int row = warp / 2 * 32, column = warp % 2 * 32;
  float sums[2][4][4] = {};
  for (int64_t first = begin; first < end; first += kDepth) {
    __syncthreads();  // the last slice has been used
    stage(of_left, left, first_i, rows, first, end);
    stage(of_right, right, first_j, columns, first, end);
    __syncthreads();
    MGHF_UNROLL(1)
    for (int k = 0; k < kDepth; k += 8) {
      if (first + k >= end) break;
      SplitA a[2];
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          const int at = (k + t + q / 2 * 4) * kPitch + row + 16 * i + g + q % 2 * 8;
          const SplitTf32 both(of_left[at]);
          a[i].big[q] = both.big;
          a[i].small[q] = both.small;
        }
      }
      MGHF_UNROLL_ALL
      for (int j = 0; j < 4; j += 2) {
        SplitB b[2];
        MGHF_UNROLL_ALL
        for (int n = 0; n < 4; ++n) {
          const int at = (k + t + n % 2 * 4) * kPitch + column + 8 * (j + n / 2) + g;
          const SplitTf32 both(of_right[at]);
          b[n / 2].big[n % 2] = both.big;
          b[n / 2].small[n % 2] = both.small;
        }
        add_products<TripleTf32, false>(sums, j, a, b);
      }
    }
  }
  // Through shared memory, so that what becomes of a product is there once, and that neighbouring
  // threads write neighbouring channels.
  __syncthreads();
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    MGHF_UNROLL_ALL
    for (int j = 0; j < 4; ++j) {
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        const int at = row + 16 * i + g + q / 2 * 8, of = column + 8 * j + 2 * t + q % 2;
        memory[at * kResultPitch + of] = sums[i][j][q];
      }
    }
  }
  __syncthreads();
  MGHF_UNROLL(2)
  for (int e = thread; e < kBlockSide * kBlockSide; e += kLayerThreads) {
    const int at = e / kBlockSide, of = e % kBlockSide;
    if (first_i + at < rows && first_j + of < columns) {
      to(part, first_i + at, first_j + of, memory[at * kResultPitch + of]);
    }
  }
}

// ---- 3x3 layers; a thread takes a channel of a pixel ----

// A(D hidden). Rows beyond the band's are only read for results that do not count.
__global__ void __launch_bounds__(kLayerThreads)
    depthwise_layer(Layer hidden, Layer to, const float* taps, int channels, Band band,
                    Activation activation) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  const int64_t pixel = i / channels;
  if (pixel >= band.pixels()) return;
  const int channel = static_cast<int>(i % channels);
  const int y = band.first + static_cast<int>(pixel / band.width);
  const int x = static_cast<int>(pixel % band.width);
  float sum = 0;
  for (int tap = 0; tap < 9; ++tap) {
    const int row = reflected(y + tap / 3 - 1, band.height) - band.first;
    const int known = row < 0 ? 0 : row < band.rows ? row : band.rows - 1;
    const int column = reflected(x + tap % 3 - 1, band.width);
    sum += taps[channel * 9 + tap] *
           *hidden.at(static_cast<int64_t>(known) * band.width + column, channel);
  }
  activate<1>(&sum, activation);
  *to.at(pixel, channel) = sum;
}

// A' D^T grad: a pixel of the hidden layer is read from the positions that are its own or reflect
// to it.
__global__ void __launch_bounds__(kLayerThreads)
    depthwise_transposed(Layer grad, Layer hidden, Layer to, const float* taps, int channels,
                         Band band, Activation activation) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  const int64_t pixel = i / channels;
  if (pixel >= band.pixels()) return;
  const int channel = static_cast<int>(i % channels);
  const int y = band.first + static_cast<int>(pixel / band.width);
  const int x = static_cast<int>(pixel % band.width);
  float sum = 0;
  // Its position, and one on either side of the image.
  for (int v = 0; v < 3; ++v) {
    const int down = v == 0 ? y : v == 1 ? -1 : band.height;
    if (v > 0 && reflected(down, band.height) != y) continue;
    for (int h = 0; h < 3; ++h) {
      const int across = h == 0 ? x : h == 1 ? -1 : band.width;
      if (h > 0 && reflected(across, band.width) != x) continue;
      for (int tap = 0; tap < 9; ++tap) {
        const int row = down - (tap / 3 - 1), column = across - (tap % 3 - 1);
        const bool inside = row >= band.first && row < band.first + band.rows && column >= 0 &&
                            column < band.width;
        if (!inside) continue;
        sum += taps[channel * 9 + tap] *
               *grad.at(static_cast<int64_t>(row - band.first) * band.width + column, channel);
      }
    }
  }
  go_back_from_value<1>(&sum, hidden.at(pixel, channel), activation);
  *to.at(pixel, channel) = sum;
}

// ---- sums over pixels; a thread takes a channel, or a channel and a tap, of a part ----

// The gradients of the 3x3 weights: grad times the hidden layer at each tap.
__global__ void __launch_bounds__(kLayerThreads)
    sum_taps(Layer grad, Layer hidden, IntoPart to, int channels, Band band, int64_t run,
             int parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  const int channel = static_cast<int>(i % channels), tap = static_cast<int>(i / channels % 9);
  const int part = static_cast<int>(i / channels / 9);
  if (part >= parts) return;
  const int64_t end = (part + 1) * run < band.count() ? (part + 1) * run : band.count();
  float sum = 0;
  for (int64_t k = part * run; k < end; ++k) {
    const int64_t pixel = band.first_counted() + k;
    const int y = band.first + static_cast<int>(pixel / band.width);
    const int x = static_cast<int>(pixel % band.width);
    const int row = reflected(y + tap / 3 - 1, band.height) - band.first;
    const int column = reflected(x + tap % 3 - 1, band.width);
    sum += *grad.at(pixel, channel) *
           *hidden.at(static_cast<int64_t>(row) * band.width + column, channel);
  }
  to(part, channel, tap, sum);
}

__global__ void __launch_bounds__(kLayerThreads)
    sum_channels(Layer grad, IntoPart to, int channels, Band band, int64_t run, int parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  const int channel = static_cast<int>(i % channels), part = static_cast<int>(i / channels);
  if (part >= parts) return;
  const int64_t end = (part + 1) * run < band.count() ? (part + 1) * run : band.count();
  float sum = 0;
  for (int64_t k = part * run; k < end; ++k) sum += *grad.at(band.first_counted() + k, channel);
  to(part, 0, channel, sum);
}

// Adds the parts, in order, to what earlier bands gave; the last band writes the result.
__global__ void __launch_bounds__(kLayerThreads)
    add_parts(const float* partial, int parts, int64_t count, bool is_first, bool is_last,
              double* totals, float* result) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  if (i >= count) return;
  double sum = is_first ? 0 : totals[i];
  for (int64_t part = 0; part < parts; ++part) {
    sum += static_cast<double>(partial[part * count + i]);
  }
  totals[i] = sum;
  if (is_last) result[i] = static_cast<float>(sum);
}

// ---- where the gradient enters ----

// From rho(z2) and the gradient (g1, g2) of y: d_r in its place, g1 as a layer, and what goes to
// the mix besides the sub-networks: d = (g1 exp(r), g2).
template <class T>
__global__ void __launch_bounds__(kLayerThreads)
    enter(Image<T> grad, int64_t b, Band band, Layer z, Layer rho, Layer g1, Layer d, int half,
          float clamp) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x;
  const int64_t pixel = i / half;
  if (pixel >= band.pixels()) return;
  const int channel = static_cast<int>(i % half);
  const int y = band.first + static_cast<int>(pixel / band.width);
  const int x = static_cast<int>(pixel % band.width);
  const T* const from = grad.pixel(b, y, x) + channel * grad.channel_stride;
  const float first = to_float(*from), second = to_float(from[half * grad.channel_stride]);
  const float log_scale = log_scale_of(*rho.at(pixel, channel), clamp);
  const float scaled = first * expf(log_scale);
  const float bent = clamp > 0 ? 1 - log_scale / clamp * (log_scale / clamp) : 1.0f;
  *rho.at(pixel, channel) = scaled * *z.at(pixel, channel) * bent;
  *g1.at(pixel, channel) = first;
  *d.at(pixel, channel) = scaled;
  *d.at(pixel, half + channel) = second;
}

}  // namespace

}  // namespace mghf::cuda
