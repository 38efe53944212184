#include "../patches.h"

#include "arguments.h"

namespace mghf::cuda {

namespace {

using Floats = py::array_t<float>;
using Integers = py::array_t<int32_t>;

// Without the biases.
Projection projection_of(const Floats& weight1, const Floats& weight2, int64_t patch_size,
                         int64_t stride) {
  return {patch_size, stride, weight1.shape(0), weight2.shape(0), weight1.data(), nullptr,
          weight2.data(), nullptr};
}

EmbeddingGradient gradient_of(const Floats& grad, const Floats& embedding, const Integers& state) {
  const auto stride = [&](int d) { return static_cast<int64_t>(grad.strides(d)) / 4; };
  return {grad.data(), stride(0), stride(1), stride(2), embedding.data(), state.data()};
}

py::tuple patches_of(const py::array& x, const Floats& weight1, const Floats& bias1,
                     const Floats& weight2, const Floats& bias2, int64_t patch_size,
                     int64_t stride) {
  Projection p = projection_of(weight1, weight2, patch_size, stride);
  p.bias1 = bias1.data();
  p.bias2 = bias2.data();
  const int64_t maps = x.shape(0) * x.shape(1), number = p.patches(x.shape(2), x.shape(3));
  Floats embedding({maps, number, p.dimension});
  Integers state({number, p.state_words(), maps});
  Workspace workspace(patches_workspace_bytes(p));
  with_image(x, [&](const auto& image) {
    check(patches(image, p, embedding.mutable_data(), state.mutable_data(), workspace.get(),
                  nullptr));
  });
  return py::make_tuple(embedding, state);
}

void image_gradient(py::array& grad_x, bool add, const Floats& grad, const Floats& embedding,
                    const Integers& state, const Floats& weight1, const Floats& weight2,
                    int64_t patch_size, int64_t stride) {
  const Projection p = projection_of(weight1, weight2, patch_size, stride);
  const EmbeddingGradient gradient = gradient_of(grad, embedding, state);
  Workspace workspace(patches_backward_workspace_bytes(
      p, grad_x.shape(0) * grad_x.shape(1), grad_x.shape(2), grad_x.shape(3)));
  with_type(grad_x, [&]<class T>(T) {
    check(patches_backward(mutable_image_of<T>(grad_x), add, p, gradient, workspace.get(),
                           nullptr));
  });
}

py::array patches_backward_of(const Floats& grad, const Floats& embedding, const Integers& state,
                              const py::array& x, const Floats& weight1, const Floats& weight2,
                              int64_t patch_size, int64_t stride) {
  py::array grad_x = new_image_like(x, x.shape(1));
  image_gradient(grad_x, false, grad, embedding, state, weight1, weight2, patch_size, stride);
  return grad_x;
}

void patches_backward_add_of(py::array grad_x, const Floats& grad, const Floats& embedding,
                             const Integers& state, const Floats& weight1, const Floats& weight2,
                             int64_t patch_size, int64_t stride) {
  image_gradient(grad_x, true, grad, embedding, state, weight1, weight2, patch_size, stride);
}

py::tuple patches_backward_weights_of(const Floats& grad, const Floats& embedding,
                                      const Integers& state, const py::array& x,
                                      const Floats& weight1, const Floats& bias1,
                                      const Floats& weight2, int64_t patch_size, int64_t stride) {
  Projection p = projection_of(weight1, weight2, patch_size, stride);
  p.bias1 = bias1.data();
  Floats grad_weight1({p.hidden, p.pixels()}), grad_bias1(p.hidden);
  Floats grad_weight2({p.dimension, p.hidden}), grad_bias2(p.dimension);
  Workspace workspace(patches_backward_weights_workspace_bytes(p, x.shape(0) * x.shape(1),
                                                               x.shape(2), x.shape(3)));
  with_image(x, [&](const auto& image) {
    check(patches_backward_weights(image, p, gradient_of(grad, embedding, state),
                                   {grad_weight1.mutable_data(), grad_bias1.mutable_data(),
                                    grad_weight2.mutable_data(), grad_bias2.mutable_data()},
                                   workspace.get(), nullptr));
  });
  return py::make_tuple(grad_weight1, grad_bias1, grad_weight2, grad_bias2);
}

}  // namespace

void define_patches(py::module_& m) {
  m.def("patches", &patches_of);
  m.def("patches_backward", &patches_backward_of);
  m.def("patches_backward_add_", &patches_backward_add_of);
  m.def("patches_backward_weights", &patches_backward_weights_of);
}

}  // namespace mghf::cuda
