// The op `coupling` on CUDA: argument checks and the calls of its kernels.
#include "../coupling.h"

#include <string>
#include <tuple>

#include "arguments.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

CouplingShape check_block(const Tensor& x, const char* argument, const Tensor& weights,
                          int64_t channels, int64_t kernel, const std::string& activation,
                          double clamp) {
  check_image(x, argument);
  const CouplingShape shape =
      check_coupling(x, channels, kernel, activation, clamp, kMostCouplingChannels);
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) * kernel * kernel < int64_t{1} << 20 &&
                      x.size(2) * x.size(3) < int64_t{1} << 30,
                  argument, " has shape ", shape_of(x),
                  "; allowed are 1 to 2^20 products for a pixel of the mix and maps of less than "
                  "2^30 pixels");
  check_float32(weights, "weights", 1);
  check_same_device(weights, "weights", x, argument);
  check_coupling_weights(weights, shape);
  return shape;
}

Tensor coupling_op(const Tensor& x, const Tensor& weights, int64_t channels, int64_t kernel,
                   const std::string& activation, double clamp) {
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  const Launcher launcher(x);
  Tensor y = new_image_like(x, channels);
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    const Tensor workspace = new_workspace(x, coupling_workspace_bytes(shape, image));
    check_launch(coupling(shape, image, weights.const_data_ptr<float>(), mutable_image_of<T>(y),
                          workspace.mutable_data_ptr(), launcher.stream()),
                 "coupling");
  });
  return y;
}

Tensor coupling_inverse_op(const Tensor& y, const Tensor& weights, int64_t channels,
                           const std::string& activation, double clamp) {
  const CouplingShape shape = check_block(y, "y", weights, channels, 1, activation, clamp);
  STD_TORCH_CHECK(y.size(1) == channels, "y has shape ", shape_of(y), "; allowed are ", channels,
                  " channels");
  const Launcher launcher(y);
  Tensor x = new_image_like(y, channels);
  with_image(y, "y", [&]<class T>(const Image<T>& image) {
    const Tensor workspace = new_workspace(y, coupling_inverse_workspace_bytes(shape, image));
    check_launch(coupling_inverse(shape, image, weights.const_data_ptr<float>(),
                                  mutable_image_of<T>(x), workspace.mutable_data_ptr(),
                                  launcher.stream()),
                 "coupling_inverse");
  });
  return x;
}

std::tuple<Tensor, Tensor> coupling_backward_op(const Tensor& grad, const Tensor& x,
                                                const Tensor& weights, int64_t channels,
                                                int64_t kernel, const std::string& activation,
                                                double clamp, bool need_weights) {
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  STD_TORCH_CHECK(!need_weights,
                  "need_weights is true; allowed is false: these kernels give the gradient of the "
                  "image only");
  check_image(grad, "grad");
  check_same_device(grad, "grad", x, "x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad has another type than x");
  check_coupling_gradient(grad, x, channels);
  const Launcher launcher(x);
  Tensor grad_x = new_image_like(x, x.size(1));
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    const Tensor workspace = new_workspace(x, coupling_backward_workspace_bytes(shape, image));
    check_launch(coupling_backward(shape, image_of<T>(grad), image,
                                   weights.const_data_ptr<float>(), mutable_image_of<T>(grad_x),
                                   workspace.mutable_data_ptr(), launcher.stream()),
                 "coupling_backward");
  });
  return {grad_x, torch::stable::new_empty(weights, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("coupling", TORCH_BOX(&coupling_op));
  m.impl("coupling_inverse", TORCH_BOX(&coupling_inverse_op));
  m.impl("coupling_backward", TORCH_BOX(&coupling_backward_op));
}
