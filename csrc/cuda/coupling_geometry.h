// The geometry of the kernels of `coupling`: rows of images cut into tiles, and features and
// channels in memory.
#pragma once

#include "coupling.h"
#include "coupling_products.h"

namespace mghf::cuda {

namespace {

constexpr int kColumns = 16;  // of a tile: a block of pixels is a row of it

// Rows of an image: `first` to `end` - 1.
struct Rows {
  int first, end;

  __host__ __device__ int count() const { return end - first; }
  // These rows and `halo` more on either side, within an image of that height.
  Rows wider(int halo, int64_t height) const {
    return {first > halo ? first - halo : 0,
            end + halo < height ? end + halo : static_cast<int>(height)};
  }
};

// Images, the rows whose features are kept, and the tiles of the rows that are computed. Several
// images are always whole.
struct Tiling {
  int batch, height, width, rows;
  Rows kept, computed;

  __host__ __device__ int down() const { return (computed.count() + rows - 1) / rows; }
  __host__ __device__ int across() const { return (width + kColumns - 1) / kColumns; }
  __host__ __device__ int64_t count() const { return int64_t{batch} * down() * across(); }
  // Index of the features of a pixel in the kept rows.
  __device__ int64_t pixel(int b, int y, int x) const {
    return (static_cast<int64_t>(b) * kept.count() + y - kept.first) * width + x;
  }
  __device__ bool holds(int y, int x) const { return y >= 0 && y < height && x >= 0 && x < width; }
  __device__ bool computes(int y, int x) const { return y < computed.end && x < width; }
};

// A tile's image and first pixel.
struct TileOrigin {
  int b, y, x;

  __device__ __forceinline__ TileOrigin(const Tiling& tiling, unsigned tile)
      : b(static_cast<int>(tile) / tiling.across() / tiling.down()),
        y(tiling.computed.first +
          static_cast<int>(tile) / tiling.across() % tiling.down() * tiling.rows),
        x(static_cast<int>(tile) % tiling.across() * kColumns) {}
};

// Features in memory: [pixel][channel].
template <class T>
struct Features {
  T* data;  // the first channel in use
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
  bool by_quads;  // whether quads are contiguous and aligned

  __device__ void read(int64_t b, int y, int x, int group, float (&to)[4]) const {
    read(image.map(b, first) + y * image.row_stride + x * image.column_stride, group, to);
  }
  // `pixel` points at its first channel.
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

// Some channels of an image.
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

}  // namespace

}  // namespace mghf::cuda
