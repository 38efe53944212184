#include "../monce.h"

#include "transport.h"

namespace mghf::cuda {

namespace {

MonceOptions options_of(double temperature, double epsilon, int64_t iterations,
                        double negative_weight, const std::string& cost,
                        const std::string& plan_gradient) {
  return {transport_of(cost, epsilon, iterations, std::nullopt), temperature, negative_weight,
          plan_gradient == "exact"};
}

int64_t bytes_for(const py::array& query, const MonceOptions& options, bool backward) {
  int64_t bytes = 0;
  check(monce_workspace_bytes(query.shape(0), query.shape(1), options, backward, bytes));
  return bytes;
}

std::tuple<py::array_t<float>, py::array_t<int>> monce_of(
    const py::array& query, const py::array& key, double temperature, double epsilon,
    int64_t iterations, double negative_weight, const std::string& cost,
    const std::string& plan_gradient, int kept) {
  const MonceOptions options =
      options_of(temperature, epsilon, iterations, negative_weight, cost, plan_gradient);
  py::array_t<float> losses({query.shape(0), query.shape(1)});
  py::array_t<int> state({query.shape(0), static_cast<py::ssize_t>(1 + 4 * kept), query.shape(1)});
  Workspace workspace(bytes_for(query, options, false));
  check(monce(matrices_of(query), matrices_of(key), options, losses.mutable_data(),
              state.mutable_data(), kept, workspace.get(), nullptr));
  return {losses, state};
}

py::array monce_backward_of(const py::array& grad, const py::array& query, const py::array& key,
                            const py::array_t<int>& state, double temperature, double epsilon, int64_t iterations,
                            double negative_weight, const std::string& cost,
                            const std::string& plan_gradient) {
  const MonceOptions options =
      options_of(temperature, epsilon, iterations, negative_weight, cost, plan_gradient);
  py::array result = array_like(query);
  Workspace workspace(bytes_for(query, options, true));
  Matrices upstream{grad.data(),
                    Element::float32,
                    grad.shape(0),
                    grad.shape(1),
                    1,
                    grad.strides(0) / grad.itemsize(),
                    grad.strides(1) / grad.itemsize(),
                    1};
  with_type(grad, [&](auto element) { upstream.element = element_of<decltype(element)>(); });
  check(monce_backward(upstream, matrices_of(query), matrices_of(key), state.data(),
                       static_cast<int>(state.shape(1) / 4), options, result.mutable_data(), workspace.get(), nullptr));
  return result;
}

}  // namespace

void define_monce(py::module_& m) {
  m.def("monce", &monce_of);
  m.def("monce_backward", &monce_backward_of);
}

}  // namespace mghf::cuda
