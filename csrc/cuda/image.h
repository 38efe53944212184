// Images and feature stacks on a GPU: (B, C, H, W) of any strides, in elements.
#pragma once

#include "numbers.h"

namespace mghf::cuda {

template <class T>
struct Image {
  const T* data;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  __host__ __device__ int64_t pixels() const { return height * width; }
  // Whether pixel p lies at p * column_stride, which spares a division per pixel.
  __host__ __device__ bool flat() const {
    return height == 1 || row_stride == width * column_stride;
  }
  // Whether a map's pixels lie side by side, and not a pixel's channels.
  bool by_maps() const { return channel_stride != 1 || column_stride == 1; }

  __device__ const T* map(int64_t b, int64_t c) const {
    return data + b * batch_stride + c * channel_stride;
  }
  template <bool kFlat>
  __device__ int64_t offset(int64_t p) const {
    return kFlat ? p * column_stride : p / width * row_stride + p % width * column_stride;
  }
};

}  // namespace mghf::cuda
