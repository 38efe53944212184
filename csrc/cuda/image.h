// Images and feature stacks on a GPU: (B, C, H, W) of any strides, in elements, with less than 2^31
// pixels to a map.
#pragma once

#include <type_traits>

#include "numbers.h"

namespace mghf::cuda {

// How the pixels of a map are read: one by one, with a division for row and column, or without if
// pixel p is at p * column_stride; or four contiguous ones at once.
enum class Reading { strided, flat, fours };

__host__ __device__ constexpr int pixels_of(Reading reading) {
  return reading == Reading::fours ? 4 : 1;
}

template <class Data>
struct ImageOf {
  using Element = std::remove_const_t<Data>;

  Data* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  __host__ __device__ int64_t pixels() const { return height * width; }
  // Whether pixel p is at p * column_stride, which saves a division per pixel.
  __host__ __device__ bool flat() const {
    return height == 1 || row_stride == width * column_stride;
  }
  // Whether a map's pixels are contiguous rather than a pixel's channels.
  bool by_maps() const { return channel_stride != 1 || column_stride == 1; }
  // Whether every four pixels, from a multiple of four on, are contiguous and aligned.
  bool by_fours() const {
    return flat() && column_stride == 1 && pixels() % 4 == 0 && channel_stride % 4 == 0 &&
           batch_stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % (4 * sizeof(Data)) == 0;
  }

  __device__ Data* map(int64_t b, int64_t c) const {
    return data + b * batch_stride + c * channel_stride;
  }
  __device__ Data* pixel(int64_t b, int64_t y, int64_t x) const {
    return data + b * batch_stride + y * row_stride + x * column_stride;
  }
  template <bool kFlat>
  __device__ int64_t offset(int64_t p) const {
    if (kFlat) return p * column_stride;
    const auto row = static_cast<uint32_t>(p) / static_cast<uint32_t>(width);
    return row * row_stride + (p - row * width) * column_stride;
  }
  // Reads or writes from pixel p of a map on.
  template <Reading kReading>
  __device__ void read(float (&values)[pixels_of(kReading)], const Element* map, int64_t p) const {
    if constexpr (kReading == Reading::fours) {
      load_four(values, map + p);
    } else {
      values[0] = to_float(map[offset<kReading == Reading::flat>(p)]);
    }
  }
  template <Reading kReading>
  __device__ void write(const float (&values)[pixels_of(kReading)], Data* map, int64_t p) const {
    if constexpr (kReading == Reading::fours) {
      store_four(map + p, values);
    } else {
      map[offset<kReading == Reading::flat>(p)] = from_float<Element>(values[0]);
    }
  }
};

// Reflection at the borders; a side of length one is repeated. Within the image for any i.
__device__ __forceinline__ int reflected(int i, int n) {
  i = i < 0 ? -i : i;
  i = i < n ? i : 2 * (n - 1) - i;
  return i < 0 ? 0 : i;
}

template <class T>
using Image = ImageOf<const T>;
template <class T>
using MutableImage = ImageOf<T>;

}  // namespace mghf::cuda
