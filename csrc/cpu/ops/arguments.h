// Checks of the CPU ops' tensors, their views for the kernels, and new tensors.
#pragma once

#include <optional>

#include "../../common/library.h"
#include "../../common/options.h"
#include "../dispatch.h"
#include "../image.h"
#include "../sinkhorn.h"

namespace mghf {

inline void check_cpu(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cpu(), argument, " is not on the CPU");
}

inline void check_float32(const Tensor& tensor, const char* argument, int64_t dimensions) {
  check_cpu(tensor, argument);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, argument, " is not float32");
  check_dimensions(tensor, argument, dimensions);
}

inline ScalarKind check_image(const Tensor& tensor, const char* argument) {
  check_cpu(tensor, argument);
  const bool float32 = tensor.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(float32 || tensor.scalar_type() == ScalarType::BFloat16, argument,
                  " is neither float32 nor bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 4, argument, " has shape ", shape_of(tensor),
                  "; allowed is (B, C, H, W)");
  return float32 ? ScalarKind::float32 : ScalarKind::bfloat16;
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

// Matrix `index` of a float32 batch.
inline MatrixView matrix_view(const Tensor& batch, int64_t index) {
  return {batch.const_data_ptr<float>() + index * batch.stride(0), batch.stride(1),
          batch.stride(2)};
}

// Uninitialised tensors on the CPU, contiguous.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         std::optional<ScalarType> type = std::nullopt) {
  Tensor result = torch::stable::new_empty(like, shape, type);
  use_huge_pages(result.mutable_data_ptr(),
                 static_cast<size_t>(result.numel()) * result.element_size());
  return result;
}

inline Tensor new_image_like(const Tensor& image, int64_t channels) {
  return new_image_like(image, channels,
                        [&](const auto& shape) { return new_tensor(image, shape); });
}

}  // namespace mghf
