// The op `gram` on CUDA: argument checks and the calls of its kernels.
#include "../gram.h"

#include "arguments.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

// Kernels count pixels and channels, rounded up to their tiles, in 32 bits.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 256;

void check_features(const Tensor& x) {
  check_image(x, "x");
  STD_TORCH_CHECK(x.size(1) < kMostSize && x.size(2) * x.size(3) < kMostSize, "x has shape ",
                  shape_of(x), "; allowed are at most ", kMostSize - 1, " pixels and channels");
}

Tensor gram_op(const Tensor& x, double scale, const std::string& precision) {
  const Precision grade = check_precision(precision);
  check_features(x);
  const int64_t batch = x.size(0), channels = x.size(1);
  const Launcher launcher(x);
  if (x.numel() == 0) {
    return torch::stable::new_zeros(x, {batch, channels, channels}, ScalarType::Float);
  }
  Tensor result = torch::stable::new_empty(x, {batch, channels, channels}, ScalarType::Float);
  const Tensor workspace =
      new_workspace(x, gram_workspace_bytes(batch, channels, x.size(2) * x.size(3)));
  with_image(x, "x", [&](const auto& image) {
    check_launch(gram(image, scale, grade, result.mutable_data_ptr<float>(),
                      workspace.mutable_data_ptr(), launcher.stream()),
                 "gram");
  });
  return result;
}

Tensor gram_backward_op(const Tensor& grad, const Tensor& x, double scale,
                        const std::string& precision) {
  const Precision grade = check_precision(precision);
  check_features(x);
  const int64_t batch = x.size(0), channels = x.size(1);
  check_float32(grad, "grad", 3);
  check_shape(grad, "grad", {batch, channels, channels});
  const Launcher launcher(x);
  Tensor grad_x = new_image_like(x, x.size(1));
  if (x.numel() == 0) return grad_x;
  const Tensor dense = torch::stable::contiguous(grad);
  const Tensor workspace = new_workspace(x, gram_backward_workspace_bytes(batch, channels));
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    check_launch(gram_backward(dense.const_data_ptr<float>(), image, scale, grade,
                               mutable_image_of<T>(grad_x), workspace.mutable_data_ptr(),
                               launcher.stream()),
                 "gram_backward");
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("gram", TORCH_BOX(&gram_op));
  m.impl("gram_backward", TORCH_BOX(&gram_backward_op));
}
