// Shared by the CUDA implementations of the ops: checks, and views for the kernels.
#pragma once

#include "../../common/library.h"
#include "../../common/options.h"
#include "../image.h"
#ifdef MGHF_CUDA_HOST
#include "../host/launcher.h"
#else
#include "launcher.h"
#endif

namespace mghf::cuda {

inline void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernels of ", op, " failed: ", error);
}

inline void check_image(const Tensor& tensor, const char* argument) {
  check_cuda(tensor, argument);
  STD_TORCH_CHECK(tensor.dim() == 4, argument, " has shape ", shape_of(tensor),
                  "; allowed is (B, C, H, W)");
}

inline void check_float32(const Tensor& tensor, const char* argument, int64_t dimensions) {
  check_cuda(tensor, argument);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, argument, " is not float32");
  check_dimensions(tensor, argument, dimensions);
}

inline void check_same_device(const Tensor& tensor, const char* argument, const Tensor& other,
                              const char* other_argument) {
  STD_TORCH_CHECK(tensor.get_device_index() == other.get_device_index(), argument,
                  " is not on the device of ", other_argument);
}

// Kernels compute a pixel's bin in float32, which has all integers up to here.
inline void check_bins(int64_t bins) {
  STD_TORCH_CHECK(bins >= 2 && bins < int64_t{1} << 24, "bins is ", bins,
                  "; allowed are 2 to 16777215");
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

inline Tensor new_image_like(const Tensor& image, int64_t channels) {
  return mghf::new_image_like(
      image, channels, [&](const auto& shape) { return torch::stable::new_empty(image, shape); });
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
