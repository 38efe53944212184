// The CUDA implementation of the native op `coupling`: argument checks, results, the calls of its kernels.
#include "../coupling.h"

#include <string>
#include <tuple>

#include "arguments.h"

namespace {

using namespace mghf::cuda;
using mghf::shape_of;

Activation check_activation(const std::string& activation) {
  if (activation == "relu6") return Activation::relu6;
  if (activation == "softplus") return Activation::softplus;
  STD_TORCH_CHECK(activation == "leaky_relu", "activation is '", activation,
                  "'; allowed are 'relu6', 'softplus', 'leaky_relu'");
  return Activation::leaky_relu;
}

CouplingShape check_block(const Tensor& x, const char* argument, const Tensor& weights,
                          int64_t channels, int64_t kernel, const std::string& activation,
                          double clamp) {
  check_image(x, argument);
  STD_TORCH_CHECK(channels >= 2 && channels % 2 == 0 && channels <= kMostCouplingChannels,
                  "channels is ", channels, "; allowed is an even number of 2 to ",
                  kMostCouplingChannels);
  STD_TORCH_CHECK(kernel == 1 || kernel == 3, "kernel is ", kernel, "; allowed are 1 and 3");
  STD_TORCH_CHECK(clamp >= 0, "clamp is ", clamp, "; allowed is 0 for none or a positive number");
  STD_TORCH_CHECK(x.size(1) > 0 && x.size(1) * kernel * kernel < int64_t{1} << 20 &&
                      x.size(2) * x.size(3) < int64_t{1} << 30,
                  argument, " has shape ", shape_of(x),
                  "; allowed are 1 to 2^20 products for a pixel of the mix and maps of less than "
                  "2^30 pixels");
  const CouplingShape shape{x.size(1), channels, kernel, check_activation(activation),
                            static_cast<float>(clamp)};
  STD_TORCH_CHECK(weights.is_cuda() && weights.get_device_index() == x.get_device_index(),
                  "weights is not on the device of ", argument);
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float, "weights is not float32");
  const int64_t count = coupling_weight_count(shape);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous() && weights.size(0) == count,
                  "weights has shape ", shape_of(weights), "; allowed is a contiguous (", count,
                  ")");
  return shape;
}

Tensor new_workspace(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

Tensor coupling_op(const Tensor& x, const Tensor& weights, int64_t channels, int64_t kernel,
                   const std::string& activation, double clamp) {
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  const Launcher launcher(x);
  Tensor y = new_image_like(x, channels);
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    Tensor workspace = new_workspace(x, coupling_workspace_bytes(shape, image));
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
    Tensor workspace = new_workspace(y, coupling_inverse_workspace_bytes(shape, image));
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
  STD_TORCH_CHECK(grad.get_device_index() == x.get_device_index(), "grad is not on x's device");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad has another type than x");
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == channels &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  "grad has shape ", shape_of(grad), "; allowed is x's, ", shape_of(x), ", with ",
                  channels, " channels");
  const Launcher launcher(x);
  Tensor grad_x = new_image_like(x, x.size(1));
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    Tensor workspace = new_workspace(x, coupling_backward_workspace_bytes(shape, image));
    check_launch(coupling_backward(shape, image_of<T>(grad), image,
                                   weights.const_data_ptr<float>(), mutable_image_of<T>(grad_x),
                                   workspace.mutable_data_ptr(), launcher.stream()),
                 "coupling_backward");
  });
  return {grad_x, torch::stable::new_empty(weights, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mghf_native, CUDA, m) {
  m.impl("coupling", TORCH_BOX(&coupling_op));
  m.impl("coupling_inverse", TORCH_BOX(&coupling_inverse_op));
  m.impl("coupling_backward", TORCH_BOX(&coupling_backward_op));
}
