// The CUDA implementations of the native ops, whose schemas the CPU library defines: argument checks,
// results and workspaces, and the calls of the kernels on the current stream of the tensors' device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../ops/shape.h"
#include "entropy.h"

namespace {

using mghf::cuda::BFloat16;
using mghf::cuda::Half;
using mghf::cuda::Image;
using mghf::shape_of;
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

void check_launch(const char* error, const char* op) {
  STD_TORCH_CHECK(error == nullptr, "the CUDA kernels of ", op, " failed: ", error);
}

void check_image(const Tensor& tensor, const char* argument) {
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

Tensor entropy(const Tensor& x, int64_t bins) {
  check_image(x, "x");
  STD_TORCH_CHECK(bins >= 2 && bins < int64_t{1} << 24, "bins is ", bins,
                  "; allowed are 2 to 16777215");
  const int64_t maps = x.size(0) * x.size(1), pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, "x has shape ", shape_of(x),
                  "; allowed are maps of less than 2^31 pixels");
  const Launcher launcher(x);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(
      x, {mghf::cuda::entropy_workspace_bytes(maps, pixels, bins)}, ScalarType::Byte);
  with_image(x, "x", [&](const auto& image) {
    check_launch(mghf::cuda::entropy(image, bins, static_cast<float*>(result.mutable_data_ptr()),
                                     workspace.mutable_data_ptr(), launcher.stream()),
                 "entropy");
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mghf_native, CUDA, m) { m.impl("entropy", TORCH_BOX(&entropy)); }
