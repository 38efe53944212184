#include "../gram.h"

#include "arguments.h"

namespace mghf::cuda {

namespace {

py::array_t<float> gram_of(const py::array& x, double scale) {
  py::array_t<float> result({x.shape(0), x.shape(1), x.shape(1)});
  with_image(x, [&](const auto& image) {
    Workspace workspace(gram_workspace_bytes(image.batch, image.channels, image.pixels()));
    check(gram(image, scale, result.mutable_data(), workspace.get(), nullptr));
  });
  return result;
}

py::array gram_backward_of(const py::array_t<float, py::array::c_style>& grad, const py::array& x,
                           double scale) {
  py::array grad_x = new_image_like(x, x.shape(1));
  with_type(x, [&](auto element) {
    using T = decltype(element);
    const Image<T> image = image_of<T>(x);
    Workspace workspace(gram_backward_workspace_bytes(image.batch, image.channels));
    check(gram_backward(grad.data(), image, scale, mutable_image_of<T>(grad_x), workspace.get(),
                        nullptr));
  });
  return grad_x;
}

}  // namespace

void define_gram(py::module_& m) {
  m.def("gram", &gram_of);
  m.def("gram_backward", &gram_backward_of);
}

}  // namespace mghf::cuda
