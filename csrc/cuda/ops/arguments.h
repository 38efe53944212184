// What the CUDA implementations of the native ops, whose schemas the CPU library defines, share: the
// current stream of a tensor's device, checks, and views for the kernels.
#pragma once

#include <initializer_list>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../ops/shape.h"
#include "../image.h"

namespace mghf::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes the tensor's device the current one, and knows its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernels of ", op, " failed: ", error);
}

inline void check_image(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cuda(), argument, " is not on a CUDA device");
  STD_TORCH_CHECK(tensor.dim() == 4, argument, " has shape ", shape_of(tensor),
                  "; allowed is (B, C, H, W)");
}

inline void check_shape(const Tensor& tensor, const char* argument, ScalarType type,
                 std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  std::string text;
  for (const int64_t size : shape) {
    same = same && tensor.size(d++) == size;
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, argument, " has shape ", shape_of(tensor), "; allowed is (", text, ")");
  STD_TORCH_CHECK(tensor.is_cuda(), argument, " is not on a CUDA device");
  STD_TORCH_CHECK(tensor.scalar_type() == type, argument, " is not ",
                  type == ScalarType::Long ? "int64" : "float32");
}

template <class T>
Image<T> image_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.size(2), t.size(3),
          t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

template <class T>
MutableImage<T> mutable_image_of(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.size(2), t.size(3),
          t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Of the size, type and layout of an image, with `channels`; contiguous unless it is channels_last.
inline Tensor new_image_like(const Tensor& image, int64_t channels) {
  const int64_t b = image.size(0), c = image.size(1), h = image.size(2), w = image.size(3);
  const auto lies_at = [&](int64_t d, int64_t stride) {
    return image.size(d) == 1 || image.stride(d) == stride;
  };
  const bool channels_last =
      lies_at(1, 1) && lies_at(3, c) && lies_at(2, c * w) && lies_at(0, c * w * h);
  if (!channels_last || image.is_contiguous()) {
    return torch::stable::new_empty(image, {b, channels, h, w});
  }
  const Tensor rows = torch::stable::new_empty(image, {b, h, w, channels});
  return torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
}

inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Calls f with the image in its type.
template <class F>
void with_image(const Tensor& tensor, const char* argument, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return f(image_of<float>(tensor));
    case ScalarType::Half:
      return f(image_of<Half>(tensor));
    case ScalarType::BFloat16:
      return f(image_of<BFloat16>(tensor));
    default:
      STD_TORCH_CHECK(false, argument, " is none of float32, float16 and bfloat16");
  }
}

}  // namespace mghf::cuda
