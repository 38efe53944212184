// The op `entropy` on CUDA: argument checks and the call of its kernels.
#include "../entropy.h"

#include "arguments.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

Tensor entropy_op(const Tensor& x, int64_t bins) {
  check_image(x, "x");
  check_bins(bins);
  const int64_t pixels = x.size(2) * x.size(3);
  STD_TORCH_CHECK(pixels < int64_t{1} << 31, "x has shape ", shape_of(x),
                  "; allowed are maps of less than 2^31 pixels");
  const Launcher launcher(x);
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float);
  const Tensor workspace =
      new_workspace(x, entropy_workspace_bytes(x.size(0), x.size(1), pixels, bins));
  with_image(x, "x", [&](const auto& image) {
    check_launch(entropy(image, bins, result.mutable_data_ptr<float>(),
                         workspace.mutable_data_ptr(), launcher.stream()),
                 "entropy");
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("entropy", TORCH_BOX(&entropy_op));
}
