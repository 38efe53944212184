// Checks of the native ops' tensors, and their views for the kernels.
#pragma once

#include <optional>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu/dispatch.h"
#include "../cpu/image.h"
#include "shape.h"

namespace mghf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_float32(const Tensor& tensor, const char* argument, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.is_cpu(), argument, " is not on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, argument, " is not float32");
  STD_TORCH_CHECK(tensor.dim() == dimensions, argument, " has shape ", shape_of(tensor),
                  "; allowed are ", dimensions, " dimensions");
}

inline ScalarKind check_image(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cpu(), argument, " is not on the CPU");
  const bool float32 = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(float32 || tensor.scalar_type() == ScalarType::BFloat16, argument,
                  " is neither float32 nor bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 4, argument, " has shape ", shape_of(tensor),
                  "; allowed is (B, C, H, W)");
  return float32 ? ScalarKind::float32 : ScalarKind::bfloat16;
}

inline void check_same_shape(const Tensor& tensor, const char* argument, const Tensor& other,
                             const char* other_argument) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == other.size(d);
  STD_TORCH_CHECK(same, argument, " has shape ", shape_of(tensor), "; allowed is ", other_argument,
                  "'s, ", shape_of(other));
}

template <class View, class Data>
View image_view(Data* data, ScalarKind kind, const Tensor& t) {
  return {data,        kind,        t.size(0),   t.size(1),   t.size(2),
          t.size(3),   t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline ImageView read_view(const Tensor& tensor, const char* argument) {
  return image_view<ImageView>(tensor.const_data_ptr(), check_image(tensor, argument), tensor);
}

inline MutableImageView write_view(const Tensor& tensor, const char* argument) {
  return image_view<MutableImageView>(tensor.mutable_data_ptr(), check_image(tensor, argument),
                                      tensor);
}

// Uninitialised tensors on the CPU, contiguous.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         std::optional<ScalarType> type = std::nullopt) {
  Tensor result = torch::stable::new_empty(like, shape, type);
  use_huge_pages(result.mutable_data_ptr(),
                 static_cast<size_t>(result.numel()) * result.element_size());
  return result;
}

// Of the size, type and layout of an image, with `channels`; contiguous unless it is channels_last.
inline Tensor new_image_like(const Tensor& image, int64_t channels) {
  const int64_t b = image.size(0), c = image.size(1), h = image.size(2), w = image.size(3);
  const auto lies_at = [](const Tensor& t, int64_t d, int64_t stride) {
    return t.size(d) == 1 || t.stride(d) == stride;
  };
  const bool channels_last = lies_at(image, 1, 1) && lies_at(image, 3, c) &&
                             lies_at(image, 2, c * w) && lies_at(image, 0, c * w * h);
  if (!channels_last || image.is_contiguous()) return new_tensor(image, {b, channels, h, w});
  const Tensor rows = new_tensor(image, {b, h, w, channels});
  return torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
}

}  // namespace mghf
