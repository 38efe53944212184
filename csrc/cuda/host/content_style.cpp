#include "../content_style.h"

#include "arguments.h"

namespace mghf::cuda {

namespace {

py::tuple content_style_of(const py::array& gt, const py::array& sr, int64_t top_m, double alpha,
                           double gamma, int64_t bins) {
  const py::ssize_t b = sr.shape(0), m = top_m;
  py::array_t<float> naive(b), mse(b), correlation(b), gram(b);
  py::array_t<int64_t> kept({b, m});
  py::array_t<float> weights({b, m}), moments({b, py::ssize_t{kStyleMoments}, m});
  py::array_t<float> difference({b, m, m});
  const StyleOptions options{top_m, alpha, gamma, bins};
  const StyleResults results{naive.mutable_data(),       mse.mutable_data(),
                             correlation.mutable_data(), gram.mutable_data(),
                             kept.mutable_data(),        weights.mutable_data(),
                             moments.mutable_data(),     difference.mutable_data()};
  with_type(sr, [&](auto element) {
    using T = decltype(element);
    const Image<T> image = image_of<T>(sr);
    Workspace workspace(content_style_workspace_bytes(image, options));
    check(content_style(image_of<T>(gt), image, options, results, workspace.get(), nullptr));
  });
  return py::make_tuple(naive, mse, correlation, gram, kept, weights, moments, difference);
}

py::array content_style_backward_of(const py::array_t<float>& grad_naive,
                                    const py::array_t<float>& grad_mse,
                                    const py::array_t<float>& grad_correlation,
                                    const py::array_t<float>& grad_gram, const py::array& gt,
                                    const py::array& sr, const py::array_t<int64_t>& kept,
                                    const py::array_t<float>& weights,
                                    const py::array_t<float>& moments,
                                    const py::array_t<float>& difference) {
  StyleGradients grads{};
  int i = 0;
  for (const auto* grad : {&grad_naive, &grad_mse, &grad_correlation, &grad_gram}) {
    grads.data[i] = grad->data();
    grads.strides[i++] = grad->strides(0) / static_cast<py::ssize_t>(sizeof(float));
  }
  const StyleStatistics statistics{kept.shape(1), kept.data(), weights.data(), moments.data(),
                                   difference.data()};
  py::array grad_sr = new_image_like(sr, sr.shape(1));
  with_type(sr, [&](auto element) {
    using T = decltype(element);
    const Image<T> image = image_of<T>(sr);
    Workspace workspace(content_style_backward_workspace_bytes(image, statistics.top_m));
    check(content_style_backward(grads, image_of<T>(gt), image, statistics,
                                 mutable_image_of<T>(grad_sr), workspace.get(), nullptr));
  });
  return grad_sr;
}

}  // namespace

void define_content_style(py::module_& m) {
  m.def("content_style", &content_style_of);
  m.def("content_style_backward", &content_style_backward_of);
}

}  // namespace mghf::cuda
