// The CUDA ops' use of PyTorch's device functions. For the host ../host/launcher.h replaces it;
// everything else in this folder is the same code on both.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../common/checks.h"
#include "../variants.h"

// The dispatch key that the ops' implementations are registered for.
#define MGHF_DISPATCH_KEY CUDA

namespace mghf::cuda {

inline void check_cuda(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cuda(), argument, " is not on a CUDA device");
}

// Makes the tensor's device the current one, knows its current stream, and keeps the choice of kernels
// as it is.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  std::shared_lock<std::shared_mutex> variants_ = hold_variants();
  void* stream_ = nullptr;
};

// Uninitialised memory on the device of `like`.
inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

}  // namespace mghf::cuda
