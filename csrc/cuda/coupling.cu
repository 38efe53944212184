// The invertible block and the gradient of its input.
//
//     (z1, z2) = M x + b                        M 1x1, or 3x3 with zero padding
//     S(f) = P A(D A(E f))                      phi, rho, eta: A the activation, D 3x3, reflected
//     z2 <- z2 + phi(z1)
//     y1 = z1 exp(r) + eta(z2),  r = rho(z2)    or r = k tanh(rho(z2) / k);   y2 = z2
//
// and back, T marking a transposed matrix, A' a slope, and (g1, g2) the gradient of y:
//
//     d_r = g1 z1 exp(r) (1 - (r / k)^2)
//     S^T(g; f) = E^T (A' D^T (A' P^T g))       A' at what S(f) has there
//     d2 = g2 + rho^T(d_r; z2) + eta^T(g1; z2)
//     d1 = g1 exp(r) + phi^T(d2; z1),           d_x = M^T (d1, d2)
//
// Method. Only features are in memory, [pixel][channel], C or 2 C of them for a pixel; of the hidden
// layers, twice as wide, only a slice of 16 or 32 channels of a tile of pixels is ever there, in the
// shared memory of the block that computes it. A block of a sub-network's kernel holds the features of
// its tile and of a halo, by as much as the 3x3 layers reach, and for each slice
//
//     1. makes the slice of A(E f) from them, on the tensor cores, halo included;
//     2. makes D of it in registers, where it lies as a factor of the next product, which adds the
//        slice's part of P A(D ...) to sums that stay in registers.
//
// The gradient's blocks make A(E f) again on a halo of 2, then A' P^T g on a halo of 1, and last
// E^T A' D^T of that. A pixel of a halo that lies outside of the image is the one it is a reflection
// of; D^T instead has a few terms more for the pixels next to a border (`transposed_at_border`).
//
// The inverse goes the other way, in float32 whatever the image is: only then it undoes a rounding.
//
//     z1 = (y1 - eta(y2)) exp(-r),  z2 = y2 - phi(z1),  x = N (z1, z2) + e,  N = M^-1, e = -N b
//
// Kernels: forward   pack, mix, phi, rho and eta;
//          gradient  pack, mix, phi, rho with d_r, rho^T and eta^T, phi^T, mix^T, and for a 3x3 mix the
//                    sum over its taps;
//          inverse   pack, copy, eta, rho, phi, mix.
//
// Products of float32 are three of TF32, those of the gradient three of bfloat16; those of halves one,
// of factors rounded as the image is. Sums, the 3x3 layers and everything pointwise are float32.
//
// Floor for B = 1, C = 128, 512 x 512, float32, a 1x1 mix: 65,536 multiply-adds a pixel by three
// products, 103 GFLOP, 0.34 ms of TF32 at 300 TFLOP/s, and 3,456 of the 3x3 layers, 0.03 ms; x and y,
// 268 MB, 0.06 ms at 4.3 TB/s, features between the kernels as much again. Halos make 1.25 of the
// sub-networks' products: 0.41 ms. Of the gradient: 57,344 multiply-adds again as above and 65,536 by
// three products of bfloat16 at 600 TFLOP/s, 0.30 + 0.17 ms; halos, and the hidden layers of rho and
// phi computed twice, make 0.55 + 0.20 ms of it.
#include "coupling.h"

#include "coupling_pointwise.h"
#include "coupling_products.h"

namespace mghf::cuda {

namespace {

// ---- geometry ----

constexpr int kColumns = 16;  // of a tile: a block of pixels is a row of it

// Rows of an image: `first` to `end` - 1.
struct Rows {
  int first, end;

  __host__ __device__ int count() const { return end - first; }
  // With so many more on either side, within an image of that height.
  Rows wider(int halo, int64_t height) const {
    return {first > halo ? first - halo : 0,
            end + halo < height ? end + halo : static_cast<int>(height)};
  }
};

// Images, of which rows the features are kept, and how those that are computed are cut into tiles. Of
// several images these are all rows.
struct Tiling {
  int batch, height, width, rows;
  Rows kept, computed;

  __host__ __device__ int down() const { return (computed.count() + rows - 1) / rows; }
  __host__ __device__ int across() const { return (width + kColumns - 1) / kColumns; }
  __host__ __device__ int64_t count() const { return int64_t{batch} * down() * across(); }
  // Where a pixel of the kept rows has its features.
  __device__ int64_t pixel(int b, int y, int x) const {
    return (static_cast<int64_t>(b) * kept.count() + y - kept.first) * width + x;
  }
  __device__ bool holds(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ bool computes(int y, int x) const { return y < computed.end && x < width; }
};

// A tile's image and first pixel.
struct Place {
  int b, y, x;

  __device__ __forceinline__ Place(const Tiling& tiling, unsigned tile)
      : b(static_cast<int>(tile) / tiling.across() / tiling.down()),
        y(tiling.computed.first +
          static_cast<int>(tile) / tiling.across() % tiling.down() * tiling.rows),
        x(static_cast<int>(tile) % tiling.across() * kColumns) {}
};

// Reflection by one, a side of length one is repeated; within the image for any i.
__device__ __forceinline__ int reflected(int i, int n) {
  i = i < 0 ? -i : i;
  i = i < n ? i : 2 * (n - 1) - i;
  return i < 0 ? 0 : i;
}

// Features in memory: [pixel][channel].
template <class T>
struct Features {
  T* data;  // the first of those meant here
  int64_t width;

  __device__ T* quad(int64_t pixel, int group) const {
    return data + pixel * width + group * kGroup + threadIdx.x % 4 * 4;
  }
};

// Channels of an image from `first` on, `count` of them, by quads; zeros beyond.
template <class T>
struct Channels {
  Image<T> image;
  int first, count;
  bool by_quads;  // whether a quad lies together and aligned

  __device__ void read(int64_t b, int y, int x, int group, float (&to)[4]) const {
    read(image.map(b, first) + y * image.row_stride + x * image.column_stride, group, to);
  }
  // `pixel`: where its first channel lies.
  __device__ void read(const T* pixel, int group, float (&to)[4]) const {
    const int c = group * kGroup + static_cast<int>(threadIdx.x) % 4 * 4;
    const T* const from = pixel + c * image.channel_stride;
    if (by_quads && c + 4 <= count) {
      read_quad(from, to);
      return;
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      to[i] = c + i < count ? to_float(from[i * image.channel_stride]) : 0.0f;
    }
  }
};
template <class T>
struct MutableChannels {
  MutableImage<T> image;
  int first, count;
  bool by_quads;

  __device__ void write(int64_t b, int y, int x, int group, const float (&from)[4]) const {
    const int c = group * kGroup + static_cast<int>(threadIdx.x) % 4 * 4;
    T* const to = image.pixel(b, y, x) + (first + c) * image.channel_stride;
    if (by_quads && c + 4 <= count) {
      write_quad(to, from);
      return;
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      if (c + i < count) to[i * image.channel_stride] = from_float<T>(from[i]);
    }
  }
};

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

// result = W x + bias, or without a bias. x: images with `terms` of W for a pixel, in their order:
// channel, and with a 3x3 kernel tap.
template <class T, class Result>
struct Mix {
  Channels<T> x;
  MutableChannels<Result> result;
  const uint4* weights;
  const float* bias;
  int pixels, height, width;  // of all that is computed; of an image's part of it
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
  const int first_pixel = first + anew(warp % 2 * 2 * kGroup + 2 * g);
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

// The gradient of x from the products of each pixel with all terms of a 3x3 mix: those of the
// neighbours, with the tap that leads from x to them.
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
// some channels of neighbouring pixels if these lie together, and else all channels of a pixel.
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

// ---- what the sub-networks' kernels share ----

struct SubnetWeights {
  const uint4 *expand, *project;                         // packed
  const uint4 *expand_transposed, *project_transposed;   // for the gradient
  const float* depthwise;                                // as it came
};

// Copies features into a tile that begins at (y, x), halo included; ends no group of copies.
template <int kThreads, int kDown, int kAcross, class T, int kChannels>
__device__ __forceinline__ void copy_tile(const Tile<T, kChannels>& tile, const Features<T>& from,
                                          const Tiling& tiling, int b, int y, int x) {
  constexpr int kOfCopy = 16 / static_cast<int>(sizeof(T)), kCopies = kChannels / kOfCopy;
  for (int i = threadIdx.x; i < kDown * kAcross * kCopies; i += kThreads) {
    const int pixel = i / kCopies, channel = i % kCopies * kOfCopy;
    // What a tile that reaches beyond the computed rows needs beyond the kept ones, nobody uses.
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

// sum = a tile of pixels times this warp's part of the slice of a packed matrix.
template <class P, class S, int kPixels, class T, int kChannels>
__device__ __forceinline__ void multiply_tile(Values (&sum)[S::kGroups][S::kRows], const S& share,
                                              const Tile<T, kChannels>& tile, const uint4* weights,
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

// The slice of A(E f) for all pixels of a tile.
template <class P, int kPixels, int kWarps, class T, int kChannels, int kSlice>
__device__ __forceinline__ void expand(const Tile<T, kSlice>& hidden,
                                       const Tile<T, kChannels>& features, const uint4* weights,
                                       int slice, Activation activation) {
  using S = Share<kPixels, kSlice, kWarps>;
  const S share;
  Values sum[S::kGroups][S::kRows] = {};
  multiply_tile<P, S, kPixels>(sum, share, features, weights, slice * (kSlice / kGroup));
  MGHF_UNROLL_ALL
  for (int n = 0; n < S::kGroups; ++n) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < S::kRows; ++i) {
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
  Features<T> features;  // what the sub-networks take
  int half, hidden;      // channels: c and 2 c
  Activation activation;
  float clamp;
  SubnetWeights subnets[2];
};

// ---- forward ----

enum class Role { add, couple, unscale, grad_rho };

// What beside the sub-networks there is to do, by role:
//     add        other += sign result; the image y if there is one
//     couple     other is z1; y
//     unscale    other *= exp(-r)
//     grad_rho   other is z1, g the first half of the gradient of y; `scaled` becomes g1 exp(r),
//                `gradients` (d_r, g1)
template <class T>
struct ForwardStage : Stage<T> {
  Role role;
  int count;  // of sub-networks
  Features<T> other;
  MutableChannels<T> y;  // y.image.data may be null
  Channels<T> g;
  Features<T> scaled, gradients;
  float sign;
};

template <class T, int kHalfOf, int kRowsOf, int kRowsOfWarpOf, int kSliceOf>
struct ForwardSizes {
  static constexpr int kHalf = kHalfOf, kRows = kRowsOf, kRowsOfWarp = kRowsOfWarpOf;
  static constexpr int kSlice = kSliceOf, kWarps = kRows / kRowsOfWarp, kThreads = kWarps * kWarp;
  static constexpr int kAcross = kColumns + 2, kPixels = (kRows + 2) * kAcross;
  static constexpr int kGroups = kHalf / kGroup;
  static constexpr int kFeatures = Tile<T, kHalf>::size(kPixels);  // elements
  static constexpr int kHidden = Tile<T, kSlice>::size(kPixels);
  static constexpr size_t kBytes = (kFeatures + kHidden) * sizeof(T) + 9 * kSlice * 4;
};

// result += S(f) of the block's tile, of which a warp has kRowsOfWarp rows.
template <class Z, class T>
__device__ __forceinline__ void add_subnet(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                           const Tile<T, Z::kHalf>& features,
                                           const Tile<T, Z::kSlice>& hidden, float* taps,
                                           const ForwardStage<T>& s, const SubnetWeights& w) {
  using P = Exact<T>;
  constexpr int kSlices = Z::kSlice / kGroup;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int first = warp * Z::kRowsOfWarp * Z::kAcross + 2 * g;
  MGHF_UNROLL(1)
  for (int slice = 0; slice * Z::kSlice < s.hidden; ++slice) {
    read_taps<Z::kThreads, Z::kSlice>(taps, w.depthwise, slice, s.hidden);
    expand<P, Z::kPixels, Z::kWarps>(hidden, features, w.expand, slice, s.activation);
    __syncthreads();
    MGHF_UNROLL(1)
    for (int group = 0; group < kSlices; ++group) {
      Values inner[Z::kRowsOfWarp] = {};
      depthwise<Z::kAcross, false>(inner, hidden, taps, group, first);
      MGHF_UNROLL_ALL
      for (int i = 0; i < Z::kRowsOfWarp; ++i) activate<kValues>(inner[i].all(), s.activation);
      multiply_add<P>(result, inner, w.project, (slice * kSlices + group) * Z::kGroups);
    }
    __syncthreads();
  }
}

// result, which is r before its clamp, becomes z1 exp(r).
template <class Z, class T>
__device__ __forceinline__ void scale_z1(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                         const ForwardStage<T>& s, const Place& place) {
  const int thread = anew(static_cast<int>(threadIdx.x));
  const int warp = thread / kWarp, g = thread % kWarp / 4;
  MGHF_UNROLL_ALL
  for (int i = 0; i < Z::kRowsOfWarp; ++i) {
    MGHF_UNROLL_ALL
    for (int row = 0; row < 2; ++row) {
      const int y = place.y + warp * Z::kRowsOfWarp + i, x = place.x + 2 * g + row;
      if (!s.tiling.computes(y, x)) continue;
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        float z1[4];
        read_quad(s.other.quad(s.tiling.pixel(place.b, y, x), n), z1);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          float& value = result[n][i].at(row, q);
          value = z1[q] * expf(log_scale_of(value, s.clamp));
        }
      }
    }
  }
}

// Calls f(image row, image column, pixel, sums) for the pixels of a thread within the image, with the
// sums of all kParts parts of the warps, a quad for each group. Pixel by pixel, out of shared memory,
// at which no other thread looks any more: out of registers each pixel would need code of its own.
template <class Z, int kParts, class F>
__device__ __forceinline__ void for_own_pixels(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                               float4* shared, const Tiling& tiling,
                                               const Place& place, const F& f) {
  constexpr int kPixels = 2 * Z::kRowsOfWarp, kThreads = Z::kRows / Z::kRowsOfWarp * kWarp;
  static_assert(kParts * kPixels * Z::kGroups * kThreads * sizeof(float4) <= Z::kBytes);
  const int thread = anew(static_cast<int>(threadIdx.x)) % kThreads;
  const int part = static_cast<int>(threadIdx.x) / kThreads;
  const auto slot = [&](int of_part, int pixel, int n) -> float4& {
    return shared[((of_part * kPixels + pixel) * Z::kGroups + n) * kThreads + thread];
  };
  if (part < kParts) {
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      MGHF_UNROLL_ALL
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        Values& v = result[n][pixel / 2];
        const int row = pixel % 2;
        slot(part, pixel, n) = float4{v.at(row, 0), v.at(row, 1), v.at(row, 2), v.at(row, 3)};
      }
    }
  }
  if (kParts > 1) __syncthreads();
  if (part >= kParts) return;
  const int top = place.y + thread / kWarp * Z::kRowsOfWarp;
  const int left = place.x + thread % kWarp / 4 * 2;
  MGHF_UNROLL(1)
  for (int pixel = part; pixel < kPixels; pixel += kParts) {
    const int y = top + pixel / 2, x = left + pixel % 2;
    if (!tiling.computes(y, x)) continue;
    float sums[Z::kGroups][4] = {};
    MGHF_UNROLL_ALL
    for (int of_part = 0; of_part < kParts; ++of_part) {
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        const float4 quad = slot(of_part, pixel, n);
        sums[n][0] += quad.x, sums[n][1] += quad.y, sums[n][2] += quad.z, sums[n][3] += quad.w;
      }
    }
    f(y, x, tiling.pixel(place.b, y, x), sums);
  }
}

// What a role has for a pixel: `result` is that of its last sub-network.
template <int kGroups, class T>
__device__ __forceinline__ void finish_pixel(const ForwardStage<T>& s, int b, int y, int x,
                                             int64_t pixel, float (&result)[kGroups][4]) {
  if (s.role == Role::couple) {
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) s.y.write(b, y, x, n, result[n]);
    return;
  }
  float other[kGroups][4];
  MGHF_UNROLL_ALL
  for (int n = 0; n < kGroups; ++n) read_quad(s.other.quad(pixel, n), other[n]);
  if (s.role == Role::grad_rho) {
    float g[kGroups][4];
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) s.g.read(b, y, x, n, g[n]);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      float scaled[4], d_rho[4];
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        const float log_scale = log_scale_of(result[n][q], s.clamp);
        const float saturation = s.clamp > 0 ? log_scale / s.clamp : 0.0f;
        scaled[q] = g[n][q] * expf(log_scale);
        d_rho[q] = scaled[q] * other[n][q] * (1.0f - saturation * saturation);
      }
      write_quad(s.scaled.quad(pixel, n), scaled);
      write_quad(s.gradients.quad(pixel, n), d_rho);
      write_quad(s.gradients.quad(pixel, n + kGroups), g[n]);
    }
    return;
  }
  MGHF_UNROLL_ALL
  for (int n = 0; n < kGroups; ++n) {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      float& value = other[n][q];
      value = s.role == Role::add ? value + s.sign * result[n][q]
                                  : value * expf(-log_scale_of(result[n][q], s.clamp));
    }
    write_quad(s.other.quad(pixel, n), other[n]);
    if (s.y.image.data != nullptr) s.y.write(b, y, x, n, other[n]);
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 2) forward_stage(ForwardStage<T> s) {
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  const Tile<T, Z::kHalf> features{reinterpret_cast<T*>(memory)};
  const Tile<T, Z::kSlice> hidden{features.data + Z::kFeatures};
  float* const taps = reinterpret_cast<float*>(hidden.data + Z::kHidden);
  {
    const Place place(s.tiling, blockIdx.x);
    copy_tile<Z::kThreads, Z::kRows + 2, Z::kAcross>(features, s.features, s.tiling, place.b,
                                                     place.y - 1, place.x - 1);
  }
  end_copies();
  wait_for_copies<0>();
  __syncthreads();
  Values result[Z::kGroups][Z::kRowsOfWarp] = {};
  MGHF_UNROLL(1)
  for (int i = 0; i < s.count; ++i) {
    if (i > 0) scale_z1<Z>(result, s, Place(s.tiling, anew(blockIdx.x)));  // eta is added to it
    add_subnet<Z>(result, features, hidden, taps, s, s.subnets[i]);
  }
  const Place place(s.tiling, anew(blockIdx.x));
  for_own_pixels<Z, 1>(result, reinterpret_cast<float4*>(memory), s.tiling, place,
                       [&](int y, int x, int64_t pixel, float (&sums)[Z::kGroups][4]) {
                         finish_pixel(s, place.b, y, x, pixel, sums);
                       });
}

// ---- backward ----

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
                                                   const Place& place) {
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

// Whether along one axis tap i of the pixel at `at` - 1 + step reads the pixel at `at`: itself, or by
// the reflection at a border.
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

// result += E^T (A' D^T through) at this warp's rows of the tile, of its part of the slice.
template <class Z, class T>
__device__ __forceinline__ void go_through_expand(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                                  const Tile<T, Z::kSlice>& through,
                                                  const Tile<T, Z::kSlice>& hidden,
                                                  const float* taps, const BackwardStage<T>& s,
                                                  const SubnetWeights& w, int slice,
                                                  const Place& place) {
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
  const Place place(s.tiling, blockIdx.x);
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

// ---- the workspace ----

// Pieces of memory, each aligned to 16 bytes; of null, just the sum of their sizes.
struct Arena {
  unsigned char* base;
  int64_t used = 0;

  template <class U>
  U* take(int64_t count) {
    U* const piece = reinterpret_cast<U*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(U)) + 15) / 16 * 16;
    return piece;
  }
};

int64_t padded_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}
int64_t padded_half(const CouplingShape& s) {
  const int64_t c = s.channels / 2;
  return c <= 32 ? 32 : c <= 64 ? 64 : 128;
}
int64_t terms_of(const CouplingShape& s) { return s.inputs * s.kernel * s.kernel; }

enum class Direction { forward, backward, inverse };

// Features of a pixel: z and, in the gradient, (d1, d2) and (d_r, g1), which make room for the products
// of a 3x3 mix.
int64_t bytes_of_pixel(const CouplingShape& s, int64_t bytes_of_element, Direction direction) {
  const int64_t features = 2 * padded_half(s) * bytes_of_element;
  if (direction != Direction::backward) return features;
  const int64_t products =
      s.kernel == 3 ? terms_of(s) * static_cast<int64_t>(sizeof(float)) : int64_t{0};
  return 2 * features + (products > features ? products : features);
}

// Rows beside those of the result that the features need on either side: z1, by the 3x3 layers and,
// in the gradient, a 3x3 mix.
int halo_of(const CouplingShape& s, Direction direction) {
  return direction == Direction::backward ? (s.kernel == 3 ? 5 : 4) : 2;
}

// What is computed at a time: some images, or some rows of one.
struct Parts {
  int64_t images, rows, kept_rows;

  Parts(const CouplingShape& s, int64_t batch, int64_t height, int64_t width,
        int64_t bytes_of_element, Direction direction) {
    constexpr int64_t kLeast = 8;  // of rows: a tile
    const int64_t of_row = bytes_of_pixel(s, bytes_of_element, direction) * width;
    const int64_t fitting = of_row > 0 ? coupling_feature_bytes / of_row : batch * height;
    const int64_t some = height > 0 ? fitting / height : batch;
    images = some < 1 ? 1 : some < batch ? some : batch;
    rows = kept_rows = height;
    if (some >= 1) return;
    const int64_t halo = 2 * halo_of(s, direction), least = (fitting - halo) / kLeast * kLeast;
    rows = least < kLeast ? kLeast : least;
    rows = rows < height ? rows : height;
    kept_rows = rows + halo < height ? rows + halo : height;
  }
};

struct PackedWeights {
  const uint4 *mix, *mix_transposed;
  const float* bias;
  SubnetWeights phi, rho, eta;
};

// Lays the packed weights out in the arena.
template <class T>
PackedWeights lay_out(const CouplingShape& s, const float* weights, Direction direction,
                      Arena& arena, Packing& packing) {
  const bool backward = direction == Direction::backward;
  const int64_t c = s.channels / 2, half = padded_half(s), terms = terms_of(s);
  packing.count = 0;
  const auto add = [&](const float* from, const Axis& n, const Axis& k, bool fast) {
    const Matrix matrix{from, n, k, nullptr, fast};
    const int loads =
        fast ? Fast<T>::kSteps * Fast<T>::kLoads : Exact<T>::kSteps * Exact<T>::kLoads;
    uint4* const to = arena.take<uint4>(matrix.blocks() * loads * kWarp);
    packing.matrices[packing.count] = matrix;
    packing.matrices[packing.count++].to = to;
    return to;
  };
  const auto take = [&](int64_t count) {
    const float* const piece = weights;
    weights += count;
    return piece;
  };
  PackedWeights packed{};
  const float* const mix = take(s.channels * terms);
  const Axis all_terms{1, terms, padded_to(terms, kGroup), 1};
  // The inverse of the mix takes features and gives an image, the mix the other way.
  const Axis all_channels{1, s.channels, padded_to(s.channels, kGroup), terms};
  packed.mix = direction == Direction::inverse ? add(mix, all_channels, {2, c, half, 1}, false)
                                               : add(mix, {2, c, half, terms}, all_terms, false);
  if (backward) packed.mix_transposed = add(mix, all_terms, {2, c, half, terms}, true);
  packing.bias = take(s.channels);
  packing.bias_axis = direction == Direction::inverse
                          ? Axis{1, s.channels, padded_to(s.channels, kGroup), 1}
                          : Axis{2, c, half, 1};
  packing.padded_bias = arena.take<float>(2 * half);
  packed.bias = packing.padded_bias;
  for (SubnetWeights* subnet : {&packed.phi, &packed.rho, &packed.eta}) {
    const float* const expand = take(2 * c * c);
    subnet->depthwise = take(2 * c * 9);
    const float* const project = take(2 * c * c);
    subnet->expand = add(expand, {1, 2 * c, 2 * half, c}, {1, c, half, 1}, false);
    // The gradient does not compute y.
    if (!(backward && subnet == &packed.eta)) {
      subnet->project = add(project, {1, c, half, 2 * c}, {1, 2 * c, 2 * half, 1}, false);
    }
    if (backward) {
      subnet->expand_transposed = add(expand, {1, c, half, 1}, {1, 2 * c, 2 * half, c}, true);
      subnet->project_transposed = add(project, {1, 2 * c, 2 * half, 1}, {1, c, half, 2 * c}, true);
    }
  }
  return packed;
}

// ---- launches ----

template <class T>
bool reads_by_quads(const T* data, int64_t first, int64_t channel_stride, int64_t batch_stride,
                    int64_t row_stride, int64_t column_stride) {
  return channel_stride == 1 && batch_stride % 4 == 0 && row_stride % 4 == 0 &&
         column_stride % 4 == 0 && first % 4 == 0 &&
         reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0;
}
template <class T>
Channels<T> channels_of(const Image<T>& i, int64_t first, int64_t count) {
  return {i, static_cast<int>(first), static_cast<int>(count),
          reads_by_quads(i.data, first, i.channel_stride, i.batch_stride, i.row_stride,
                         i.column_stride)};
}
template <class T>
MutableChannels<T> channels_of(const MutableImage<T>& i, int64_t first, int64_t count) {
  return {i, static_cast<int>(first), static_cast<int>(count),
          reads_by_quads(i.data, first, i.channel_stride, i.batch_stride, i.row_stride,
                         i.column_stride)};
}

// Some of the images.
template <class I>
I part_of(I images, int64_t first, int64_t count) {
  images.data += first * images.batch_stride;
  images.batch = count;
  return images;
}

// Features of some rows as images, with all of a pixel's channels; row 0 is the first of them.
template <class T>
MutableImage<T> image_of(const Features<T>& f, int64_t batch, int64_t height, int64_t width) {
  return {f.data, batch, f.width, height, width, height * width * f.width, 1, width * f.width,
          f.width};
}
template <class T>
Image<T> read_only(const MutableImage<T>& i) {
  return {i.data,         i.batch,          i.channels,   i.height,       i.width,
          i.batch_stride, i.channel_stride, i.row_stride, i.column_stride};
}

// One call for some of its images, or for some rows of one.
template <class T>
struct Run {
  const CouplingShape& shape;
  const PackedWeights& packed;
  int64_t batch, height, width, shared_bytes;
  Rows result, kept;  // of the result, and of which there are features
  Stream stream;

  int64_t half() const { return padded_half(shape); }
  int64_t pixels() const { return batch * kept.count() * width; }
  Rows around(int halo) const { return result.wider(halo, height); }

  // Rows of features as images whose rows have the numbers of the image's.
  template <class U>
  MutableImage<U> image_of(const Features<U>& f) const {
    MutableImage<U> image = cuda::image_of(f, batch, kept.count(), width);
    image.data -= kept.first * image.row_stride;
    return image;
  }

  // For `rows` of x and of the result.
  template <class P, int kKernel, class Result>
  const char* mix(const Channels<T>& x, MutableChannels<Result> result, const uint4* weights,
                  const float* bias, int64_t terms, const Rows& rows) const {
    const int64_t count = batch * rows.count() * width;
    const int64_t blocks = (count + kMixPixels - 1) / kMixPixels *
                           ((result.count + kMixColumns - 1) / kMixColumns);
    result.image.data += rows.first * result.image.row_stride;
    const Mix<T, Result> m{x,
                           result,
                           weights,
                           bias,
                           static_cast<int>(count),
                           rows.count(),
                           static_cast<int>(width),
                           rows.first,
                           static_cast<int>(terms)};
    return launch(cuda::mix<T, Result, P, kKernel>, {blocks, kMixThreads}, stream, m);
  }

  const char* features(const Image<T>& x, const Features<T>& z) const {
    const Channels<T> from = channels_of(x, 0, shape.inputs);
    const MutableChannels<T> to = channels_of(image_of(z), 0, 2 * half());
    const int64_t terms = terms_of(shape);
    return shape.kernel == 1 ? mix<Exact<T>, 1>(from, to, packed.mix, packed.bias, terms, kept)
                             : mix<Exact<T>, 3>(from, to, packed.mix, packed.bias, terms, kept);
  }

  Stage<T> stage(const Features<T>& features, int rows, const Rows& computed) const {
    return {{static_cast<int>(batch), static_cast<int>(height), static_cast<int>(width), rows, kept,
             computed},
            features,
            static_cast<int>(shape.channels / 2),
            static_cast<int>(shape.channels),
            shape.activation,
            shape.clamp,
            {}};
  }

  // `fill` completes the stage's parameters.
  template <class Fill>
  const char* forward(Role role, const Features<T>& features, const Rows& rows,
                      const Fill& fill) const {
    switch (half()) {
      case 32:
        return forward<ForwardSizes<T, 32, 8, 2, 32>>(role, features, rows, fill);
      case 64:
        return forward<ForwardSizes<T, 64, 8, 2, 32>>(role, features, rows, fill);
      default:
        return forward<ForwardSizes<T, 128, 4, 1, 16>>(role, features, rows, fill);
    }
  }
  template <class Z, class Fill>
  const char* forward(Role role, const Features<T>& features, const Rows& rows,
                      const Fill& fill) const {
    ForwardStage<T> s{stage(features, Z::kRows, rows), role, role == Role::couple ? 2 : 1, {}, {},
                      {}, {}, {}, 1.0f};
    fill(s);
    return launch(forward_stage<T, Z>, {s.tiling.count(), Z::kThreads, Z::kBytes}, stream, s);
  }

  template <class Fill>
  const char* backward(const Features<T>& features, const Rows& rows, const Fill& fill) const {
    if (half() == 32) return backward<BackwardSizes<T, 32, 8, 2, 1, 4, 16>>(features, rows, fill);
    if (half() == 64) {
      using Large = BackwardSizes<T, 64, 8, 2, 2, 8, 32>;
      if (sizeof(T) == 2 || shared_bytes >= static_cast<int64_t>(Large::kBytes)) {
        return backward<Large>(features, rows, fill);
      }
      if constexpr (sizeof(T) == 4) {
        return backward<BackwardSizes<T, 64, 4, 1, 1, 4, 16>>(features, rows, fill);
      }
    }
    using Large = BackwardSizes<T, 128, 4, 1, 1, 4, 16>;
    if (sizeof(T) == 2 || shared_bytes >= static_cast<int64_t>(Large::kBytes)) {
      return backward<Large>(features, rows, fill);
    }
    if constexpr (sizeof(T) == 4) {
      return backward<BackwardSizes<T, 128, 1, 1, 1, 4, 16>>(features, rows, fill);
    }
    return nullptr;
  }
  template <class Z, class Fill>
  const char* backward(const Features<T>& features, const Rows& rows, const Fill& fill) const {
    BackwardStage<T> s{stage(features, Z::kRows, rows), 0, {}, {}, {}};
    fill(s);
    return launch(backward_stage<T, Z>, {s.tiling.count(), Z::kThreads, Z::kBytes}, stream, s);
  }

  // z from x, and phi in it, of all rows that are kept but the outermost; into the second half of y if
  // there is one.
  const char* start(const Image<T>& x, const Features<T>& z, const MutableImage<T>& y,
                    const Rows& rows) const {
    if (const char* error = features(x, z); error != nullptr) return error;
    return forward(Role::add, z, rows, [&](ForwardStage<T>& s) {
      s.other = {z.data + half(), z.width};
      s.subnets[0] = packed.phi;
      s.y = channels_of(y, shape.channels / 2, shape.channels / 2);
    });
  }

  const char* value(const Image<T>& x, const MutableImage<T>& y, Arena arena) const {
    const Features<T> z{arena.take<T>(pixels() * 2 * half()), 2 * half()};
    if (const char* error = start(x, z, y, around(1)); error != nullptr) return error;
    return forward(Role::couple, {z.data + half(), z.width}, result, [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
      s.subnets[1] = packed.eta;
      s.y = channels_of(y, 0, shape.channels / 2);
    });
  }

  // T is float: y's type is another.
  template <class Y>
  const char* inverse(const Image<Y>& y, const MutableImage<Y>& x, Arena arena) const {
    const int64_t wide = 2 * half(), count = pixels() * wide;
    const Features<T> z{arena.take<T>(count), wide}, z2{z.data + half(), wide};
    const char* error = launch(copy_features<Y>,
                               {(count + kCopyThreads - 1) / kCopyThreads, kCopyThreads}, stream,
                               y, z, half(), y.by_maps(), kept);
    if (error != nullptr) return error;
    error = forward(Role::add, z2, around(1), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.eta;
      s.sign = -1;
    });
    if (error != nullptr) return error;
    error = forward(Role::unscale, z2, around(1), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
    });
    if (error != nullptr) return error;
    error = forward(Role::add, z, result, [&](ForwardStage<T>& s) {
      s.other = z2;
      s.subnets[0] = packed.phi;
      s.sign = -1;
    });
    if (error != nullptr) return error;
    return mix<ExactFloats, 1>(
        channels_of(read_only(image_of(z)), 0, wide), channels_of(x, 0, shape.channels), packed.mix,
        packed.bias, wide, result);
  }

  const char* gradient(const Image<T>& grad, const Image<T>& x, const MutableImage<T>& grad_x,
                       Arena arena) const {
    const int64_t c = shape.channels / 2, wide = 2 * half();
    const auto take = [&] { return Features<T>{arena.take<T>(pixels() * wide), wide}; };
    const auto second = [&](const Features<T>& f) { return Features<T>{f.data + half(), wide}; };
    // Rows beyond its own that a product of a 3x3 mix reaches.
    const int reach = shape.kernel == 3 ? 1 : 0;
    const Features<T> z = take(), d = take();
    // What comes last takes the place of the gradients of rho and eta.
    const Arena before = arena;
    const Features<T> gradients = take();
    if (const char* error = start(x, z, {}, around(3 + reach)); error != nullptr) return error;
    const char* error = forward(Role::grad_rho, second(z), around(2 + reach), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
      s.g = channels_of(grad, 0, c);
      s.scaled = d;
      s.gradients = gradients;
    });
    if (error != nullptr) return error;
    error = backward(second(z), around(1 + reach), [&](BackwardStage<T>& s) {
      s.count = 2;
      s.subnets[0] = packed.rho;
      s.subnets[1] = packed.eta;
      s.gradients[0] = gradients;
      s.gradients[1] = second(gradients);
      s.direct = channels_of(grad, c, c);
      s.result = second(d);
    });
    if (error != nullptr) return error;
    const Image<T> all_d = read_only(image_of(d));
    error = backward(z, around(reach), [&](BackwardStage<T>& s) {
      s.count = 1;
      s.subnets[0] = packed.phi;
      s.gradients[0] = second(d);
      s.direct = channels_of(all_d, 0, half());
      s.result = d;
    });
    if (error != nullptr) return error;
    const Channels<T> from = channels_of(all_d, 0, wide);
    const int64_t terms = terms_of(shape);
    if (shape.kernel == 1) {
      return mix<Fast<T>, 1>(from, channels_of(grad_x, 0, terms), packed.mix_transposed, nullptr,
                             wide, result);
    }
    arena = before;
    const Features<float> products{arena.take<float>(pixels() * terms), terms};
    error = mix<Fast<T>, 1>(
        from, channels_of(image_of(products), 0, terms), packed.mix_transposed, nullptr, wide,
        around(1));
    if (error != nullptr) return error;
    const int64_t results = batch * result.count() * width * shape.inputs;
    return launch(gather<T>, {(results + kGatherThreads - 1) / kGatherThreads, kGatherThreads},
                  stream, products.data, grad_x, kept, result);
  }
};

// Packs the weights, then calls f(run, first image, arena) for some images after the other. T is that
// of the features; x has the size of all images.
template <class T, class X, class F>
const char* in_parts(const CouplingShape& shape, const Image<X>& x, const float* weights,
                     Direction direction, void* workspace, Stream stream, const F& f) {
  if (x.batch * x.height * x.width == 0) return nullptr;
  Gpu gpu;
  if (const char* error = current_gpu(gpu); error != nullptr) return error;
  Arena arena{static_cast<unsigned char*>(workspace)};
  Packing packing{};
  const PackedWeights packed = lay_out<T>(shape, weights, direction, arena, packing);
  const char* error = launch(pack_weights<T>,
                             {(packing.blocks() * kWarp + kPackThreads - 1) / kPackThreads,
                              kPackThreads},
                             stream, packing);
  const Parts parts(shape, x.batch, x.height, x.width, sizeof(T), direction);
  for (int64_t first = 0; first < x.batch && error == nullptr; first += parts.images) {
    const int64_t count = parts.images < x.batch - first ? parts.images : x.batch - first;
    for (int64_t row = 0; row < x.height && error == nullptr; row += parts.rows) {
      const int64_t end = row + parts.rows < x.height ? row + parts.rows : x.height;
      const Rows result{static_cast<int>(row), static_cast<int>(end)};
      error = f(Run<T>{shape, packed, count, x.height, x.width, gpu.shared_bytes, result,
                       result.wider(halo_of(shape, direction), x.height), stream},
                first, arena);
    }
  }
  return error;
}

template <class T>
int64_t workspace_bytes(const CouplingShape& shape, int64_t batch, int64_t height, int64_t width,
                        Direction direction) {
  Arena arena{nullptr};
  Packing packing{};
  lay_out<T>(shape, nullptr, direction, arena, packing);
  const Parts parts(shape, batch, height, width, sizeof(T), direction);
  return arena.used + parts.images * parts.kept_rows * width *
                          bytes_of_pixel(shape, sizeof(T), direction);
}

}  // namespace

int64_t coupling_feature_bytes = int64_t{160} << 20;

template <class T>
int64_t coupling_workspace_bytes(const CouplingShape& shape, const Image<T>& x) {
  return workspace_bytes<T>(shape, x.batch, x.height, x.width, Direction::forward);
}
template <class T>
int64_t coupling_backward_workspace_bytes(const CouplingShape& shape, const Image<T>& x) {
  return workspace_bytes<T>(shape, x.batch, x.height, x.width, Direction::backward);
}
template <class T>
int64_t coupling_inverse_workspace_bytes(const CouplingShape& shape, const Image<T>& y) {
  return workspace_bytes<float>(shape, y.batch, y.height, y.width, Direction::inverse);
}

template <class T>
const char* coupling(const CouplingShape& shape, const Image<T>& x, const float* weights,
                     const MutableImage<T>& y, void* workspace, Stream stream) {
  return in_parts<T>(shape, x, weights, Direction::forward, workspace, stream,
                     [&](const Run<T>& run, int64_t first, const Arena& arena) {
                       return run.value(part_of(x, first, run.batch), part_of(y, first, run.batch),
                                        arena);
                     });
}

template <class T>
const char* coupling_backward(const CouplingShape& shape, const Image<T>& grad, const Image<T>& x,
                              const float* weights, const MutableImage<T>& grad_x,
                              void* workspace, Stream stream) {
  return in_parts<T>(shape, x, weights, Direction::backward, workspace, stream,
                     [&](const Run<T>& run, int64_t first, const Arena& arena) {
                       return run.gradient(part_of(grad, first, run.batch),
                                           part_of(x, first, run.batch),
                                           part_of(grad_x, first, run.batch), arena);
                     });
}

template <class T>
const char* coupling_inverse(const CouplingShape& shape, const Image<T>& y, const float* weights,
                             const MutableImage<T>& x, void* workspace, Stream stream) {
  return in_parts<float>(shape, y, weights, Direction::inverse, workspace, stream,
                         [&](const Run<float>& run, int64_t first, const Arena& arena) {
                           return run.inverse(part_of(y, first, run.batch),
                                              part_of(x, first, run.batch), arena);
                         });
}

#define MGHF_INSTANTIATE(T)                                                                      \
  template int64_t coupling_workspace_bytes(const CouplingShape&, const Image<T>&);              \
  template int64_t coupling_backward_workspace_bytes(const CouplingShape&, const Image<T>&);     \
  template int64_t coupling_inverse_workspace_bytes(const CouplingShape&, const Image<T>&);      \
  template const char* coupling(const CouplingShape&, const Image<T>&, const float*,             \
                                const MutableImage<T>&, void*, Stream);                          \
  template const char* coupling_backward(const CouplingShape&, const Image<T>&, const Image<T>&, \
                                         const float*, const MutableImage<T>&, void*, Stream);   \
  template const char* coupling_inverse(const CouplingShape&, const Image<T>&, const float*,     \
                                        const MutableImage<T>&, void*, Stream);
MGHF_INSTANTIATE(float)
MGHF_INSTANTIATE(Half)
MGHF_INSTANTIATE(BFloat16)
#undef MGHF_INSTANTIATE

}  // namespace mghf::cuda
