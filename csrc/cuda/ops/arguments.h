// What the CUDA implementations of the native ops, whose schemas the CPU library defines, share: the
// current stream of a tensor's device, checks, and views for the kernels.
#pragma once

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

template <class T>
Image<T> image_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.size(0), t.size(1), t.size(2), t.size(3),
          t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
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
