#include "../sinkhorn.h"

#include "transport.h"

namespace mghf::cuda {

namespace {

int64_t bytes_for(const py::array& similarity, int64_t iterations, bool backward) {
  int64_t bytes = 0;
  check(sinkhorn_workspace_bytes(similarity.shape(0), similarity.shape(1), iterations, backward,
                                 bytes));
  return bytes;
}

py::array sinkhorn_of(const py::array& similarity, const std::string& cost, double epsilon,
                      int64_t iterations, std::optional<double> tolerance) {
  py::array plan = array_like(similarity);
  Workspace workspace(bytes_for(similarity, iterations, false));
  check(sinkhorn(matrices_of(similarity), transport_of(cost, epsilon, iterations, tolerance),
                 plan.mutable_data(), workspace.get(), nullptr));
  return plan;
}

py::array sinkhorn_backward_of(const py::array& grad, const py::array& similarity,
                               const std::string& cost, double epsilon, int64_t iterations,
                               std::optional<double> tolerance) {
  py::array result = array_like(similarity);
  Workspace workspace(bytes_for(similarity, iterations, true));
  check(sinkhorn_backward(matrices_of(grad), matrices_of(similarity),
                          transport_of(cost, epsilon, iterations, tolerance),
                          result.mutable_data(), workspace.get(), nullptr));
  return result;
}

}  // namespace

void define_sinkhorn(py::module_& m) {
  m.def("sinkhorn", &sinkhorn_of);
  m.def("sinkhorn_backward", &sinkhorn_backward_of);
}

}  // namespace mghf::cuda
