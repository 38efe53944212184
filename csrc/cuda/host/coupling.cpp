#include "../coupling.h"

#include <string>

#include "arguments.h"

namespace mghf::cuda {

namespace {

Activation activation_of(const std::string& name) {
  if (name == "relu6") return Activation::relu6;
  if (name == "softplus") return Activation::softplus;
  return Activation::leaky_relu;
}

py::array coupling_of(const py::array& x, const py::array_t<float>& weights, int64_t channels,
                      int64_t kernel, const std::string& activation, double clamp) {
  py::array y;
  with_image(x, [&]<class T>(const Image<T>& image) {
    const CouplingShape shape{image.channels, channels, kernel, activation_of(activation),
                              static_cast<float>(clamp)};
    y = new_image_like(x, channels);
    const auto to = mutable_image_of<T>(y);
    Workspace workspace(coupling_workspace_bytes(shape, image));
    check(coupling(shape, image, weights.data(), to, workspace.get(), nullptr));
  });
  return y;
}

py::tuple coupling_backward_of(const py::array& grad, const py::array& x,
                               const py::array_t<float>& weights, int64_t channels, int64_t kernel,
                               const std::string& activation, double clamp, bool need_weights) {
  if (need_weights) throw std::invalid_argument("there are no gradients of the weights");
  py::array grad_x;
  with_image(x, [&]<class T>(const Image<T>& image) {
    const CouplingShape shape{image.channels, channels, kernel, activation_of(activation),
                              static_cast<float>(clamp)};
    grad_x = new_image_like(x, image.channels);
    const auto to = mutable_image_of<T>(grad_x);
    Workspace workspace(coupling_backward_workspace_bytes(shape, image));
    check(coupling_backward(shape, image_of<T>(grad), image, weights.data(), to, workspace.get(),
                            nullptr));
  });
  return py::make_tuple(grad_x, py::array_t<float>(0));
}

py::array coupling_inverse_of(const py::array& y, const py::array_t<float>& weights,
                              int64_t channels, const std::string& activation, double clamp) {
  py::array x;
  with_image(y, [&]<class T>(const Image<T>& image) {
    const CouplingShape shape{channels, channels, 1, activation_of(activation),
                              static_cast<float>(clamp)};
    x = new_image_like(y, channels);
    const auto to = mutable_image_of<T>(x);
    Workspace workspace(coupling_inverse_workspace_bytes(shape, image));
    check(coupling_inverse(shape, image, weights.data(), to, workspace.get(), nullptr));
  });
  return x;
}

}  // namespace

void define_coupling(py::module_& m) {
  m.def("coupling", &coupling_of);
  m.def("coupling_backward", &coupling_backward_of);
  m.def("coupling_inverse", &coupling_inverse_of);
  m.def("set_coupling_feature_bytes", [](int64_t bytes) { coupling_feature_bytes = bytes; });
}

}  // namespace mghf::cuda
