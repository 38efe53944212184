// The CUDA implementation of the native op `entropy`: argument checks, results, the call of its kernels.
#include "../entropy.h"

#include "arguments.h"

namespace {

using namespace mghf::cuda;
using mghf::shape_of;

Tensor entropy_op(const Tensor& x, int64_t bins) {
  check_image(x, "x");
  STD_TORCH_CHECK(bins >= 2 && bins < int64_t{1} << 24, "bins is ", bins,
                  "; allowed are 2 to 16777215");
  const int64_t pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, "x has shape ", shape_of(x),
                  "; allowed are maps of less than 2^31 pixels");
  const Launcher launcher(x);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  Tensor workspace = torch::stable::new_empty(
      x, {entropy_workspace_bytes(x.size(0), x.size(1), pixels, bins)}, ScalarType::Byte);
  with_image(x, "x", [&](const auto& image) {
    check_launch(entropy(image, bins, static_cast<float*>(result.mutable_data_ptr()),
                                     workspace.mutable_data_ptr(), launcher.stream()),
                 "entropy");
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mghf_native, CUDA, m) { m.impl("entropy", TORCH_BOX(&entropy_op)); }
