// Images and feature stacks in memory: any strides, float32 or bfloat16.
#pragma once

#include <cstdint>

namespace mghf {

enum class ScalarKind { float32, bfloat16 };

// (B, C, H, W), strides in elements. Kernels read and write it through pixels.h.
template <class Data>
struct BasicImageView {
  Data* data;
  ScalarKind kind;
  int64_t batch, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;
};
using ImageView = BasicImageView<const void>;
using MutableImageView = BasicImageView<void>;

}  // namespace mghf
