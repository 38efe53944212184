// The op `coupling` on CUDA: argument checks and the calls of its kernels.
#include "../coupling.h"
#include "../coupling_weights.h"

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

template <class T>
void pack(const Tensor& weights, const Tensor& packed, const CouplingShape& shape,
          const Launcher& launcher) {
  check_launch(coupling_pack<T>(shape, weights.const_data_ptr<float>(), packed.mutable_data_ptr(),
                                launcher.stream()),
               "coupling_pack");
}

// `packed` is filled already.
template <class T>
CouplingBlock block_of(const Tensor& weights, const Tensor& packed, const CouplingShape& shape,
                       Precision precision) {
  return {shape, weights.const_data_ptr<float>(), packed.mutable_data_ptr(), precision};
}

template <class T>
CouplingBlock packed_block(const Tensor& x, const Tensor& weights, const CouplingShape& shape,
                           const Tensor& packed, Precision precision,
                           const Launcher& launcher) {
  if (x.numel() > 0) pack<T>(weights, packed, shape, launcher);
  return block_of<T>(weights, packed, shape, precision);
}

template <class T>
void check_packed(const Tensor& packed, const Tensor& x, const CouplingShape& shape) {
  check_cuda(packed, "packed");
  check_same_device(packed, "packed", x, "x");
  const int64_t bytes = coupling_packed_bytes<T>(shape);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, "packed is not uint8");
  STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.size(0) == bytes,
                  "packed has shape ", shape_of(packed), "; allowed is a contiguous (", bytes,
                  "), from coupling_pack for images like x");
}

// The shape is (B, H, W, bytes of a pixel), or (0) for none.
template <class T>
void check_state(const Tensor& state, const Tensor& x, const CouplingShape& shape) {
  if (state.numel() == 0) return;
  check_cuda(state, "state");
  check_same_device(state, "state", x, "x");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Byte && state.is_contiguous(),
                  "state is not a contiguous tensor of uint8");
  check_shape(state, "state", {x.size(0), x.size(2), x.size(3), coupling_state_bytes<T>(shape)});
}

Tensor coupling_op(const Tensor& x, const Tensor& weights, int64_t channels, int64_t kernel,
                   const std::string& activation, double clamp,
                   const std::string& precision) {
  const Precision grade = check_precision(precision);
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  const Launcher launcher(x);
  Tensor y = new_image_like(x, channels);
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    const Tensor packed = new_workspace(x, coupling_packed_bytes<T>(shape));
    const Tensor workspace = new_workspace(x, coupling_workspace_bytes(shape, image));
    const CouplingBlock block = packed_block<T>(x, weights, shape, packed, grade, launcher);
    check_launch(coupling(block, image, mutable_image_of<T>(y), {},
                          workspace.mutable_data_ptr(), launcher.stream()),
                 "coupling");
  });
  return y;
}

Tensor coupling_pack_op(const Tensor& x, const Tensor& weights, int64_t channels, int64_t kernel) {
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, "relu6", 0);
  const Launcher launcher(x);
  Tensor packed;
  with_image(x, "x", [&]<class T>(const Image<T>&) {
    const int64_t bytes = coupling_packed_bytes<T>(shape);
    packed = torch::stable::new_empty(weights, {bytes}, ScalarType::Byte);
    pack<T>(weights, packed, shape, launcher);
  });
  return packed;
}

std::tuple<Tensor, Tensor> coupling_packed_op(const Tensor& x, const Tensor& weights,
                                              const Tensor& packed, int64_t channels,
                                              int64_t kernel, const std::string& activation,
                                              double clamp, bool keep,
                                              const std::string& precision) {
  const Precision grade = check_precision(precision);
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  const Launcher launcher(x);
  Tensor y = new_image_like(x, channels), state;
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    check_packed<T>(packed, x, shape);
    const int64_t bytes = keep ? coupling_state_bytes<T>(shape) : 0;
    state = bytes == 0 ? torch::stable::new_empty(x, {0}, ScalarType::Byte)
                       : torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(3), bytes},
                                                  ScalarType::Byte);
    const Tensor workspace = new_workspace(x, coupling_workspace_bytes(shape, image));
    const CouplingState<unsigned char> kept{
        bytes > 0, static_cast<unsigned char*>(state.mutable_data_ptr())};
    check_launch(coupling(block_of<T>(weights, packed, shape, grade), image,
                          mutable_image_of<T>(y), kept, workspace.mutable_data_ptr(),
                          launcher.stream()),
                 "coupling_packed");
  });
  return {y, state};
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

void check_grad(const Tensor& grad, const Tensor& x, int64_t channels) {
  check_image(grad, "grad");
  check_same_device(grad, "grad", x, "x");
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad has another type than x");
  check_coupling_gradient(grad, x, channels);
}

Tensor gradients_of_weights(const CouplingShape& shape, const Tensor& grad, const Tensor& x,
                            const Tensor& weights, const Launcher& launcher) {
  if (x.numel() == 0) return torch::stable::new_zeros(weights, {weights.size(0)});
  Tensor result = torch::stable::new_empty(weights, {weights.size(0)});
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    const Tensor workspace = new_workspace(x, coupling_weights_workspace_bytes(shape, image));
    check_launch(coupling_weights(shape, image_of<T>(grad), image,
                                  weights.const_data_ptr<float>(),
                                  result.mutable_data_ptr<float>(), workspace.mutable_data_ptr(),
                                  launcher.stream()),
                 "coupling_backward");
  });
  return result;
}

std::tuple<Tensor, Tensor> coupling_backward_op(const Tensor& grad, const Tensor& x,
                                                const Tensor& weights, int64_t channels,
                                                int64_t kernel, const std::string& activation,
                                                double clamp, bool need_weights,
                                                const std::string& precision) {
  const Precision grade = check_precision(precision);
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  check_grad(grad, x, channels);
  const Launcher launcher(x);
  Tensor grad_x = new_image_like(x, x.size(1));
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    const Tensor packed = new_workspace(x, coupling_packed_bytes<T>(shape));
    const Tensor workspace =
        new_workspace(x, coupling_backward_workspace_bytes(shape, image, false));
    const CouplingBlock block = packed_block<T>(x, weights, shape, packed, grade, launcher);
    check_launch(coupling_backward(block, image_of<T>(grad), image, {},
                                   mutable_image_of<T>(grad_x), workspace.mutable_data_ptr(),
                                   launcher.stream()),
                 "coupling_backward");
  });
  if (!need_weights) return {grad_x, torch::stable::new_empty(weights, {0})};
  return {grad_x, gradients_of_weights(shape, grad, x, weights, launcher)};
}

Tensor coupling_packed_backward_op(const Tensor& grad, const Tensor& x, const Tensor& weights,
                                   const Tensor& packed, const Tensor& state, int64_t channels,
                                   int64_t kernel, const std::string& activation, double clamp,
                                   const std::string& precision) {
  const Precision grade = check_precision(precision);
  const CouplingShape shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  check_grad(grad, x, channels);
  const Launcher launcher(x);
  Tensor grad_x = new_image_like(x, x.size(1));
  with_image(x, "x", [&]<class T>(const Image<T>& image) {
    check_packed<T>(packed, x, shape);
    check_state<T>(state, x, shape);
    const bool with_state = state.numel() > 0;
    const Tensor workspace =
        new_workspace(x, coupling_backward_workspace_bytes(shape, image, with_state));
    const CouplingState<const unsigned char> kept{
        with_state, static_cast<const unsigned char*>(state.const_data_ptr())};
    check_launch(coupling_backward(block_of<T>(weights, packed, shape, grade),
                                   image_of<T>(grad), image, kept, mutable_image_of<T>(grad_x),
                                   workspace.mutable_data_ptr(), launcher.stream()),
                 "coupling_packed_backward");
  });
  return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("coupling", TORCH_BOX(&coupling_op));
  m.impl("coupling_inverse", TORCH_BOX(&coupling_inverse_op));
  m.impl("coupling_backward", TORCH_BOX(&coupling_backward_op));
  m.impl("coupling_pack", TORCH_BOX(&coupling_pack_op));
  m.impl("coupling_packed", TORCH_BOX(&coupling_packed_op));
  m.impl("coupling_packed_backward", TORCH_BOX(&coupling_packed_backward_op));
}
