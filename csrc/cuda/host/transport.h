// Arguments that `sinkhorn` and `monce` share.
#pragma once

#include <pybind11/stl.h>

#include <optional>

#include "../sinkhorn.h"
#include "arguments.h"

namespace mghf::cuda {

inline TransportOptions transport_of(const std::string& cost, double epsilon, int64_t iterations,
                                     std::optional<double> tolerance) {
  return {cost == "hard"   ? TransportCost::hard
          : cost == "easy" ? TransportCost::easy
                           : TransportCost::exp,
          epsilon, iterations, tolerance.has_value(), static_cast<float>(tolerance.value_or(0))};
}

inline Matrices matrices_of(const py::array& x) {
  if (x.ndim() != 3) throw std::invalid_argument("x is not (B, N, M)");
  const auto stride = [&](int d) { return static_cast<int64_t>(x.strides(d)) / x.itemsize(); };
  Element element = Element::float32;
  with_type(x, [&](auto of_type) { element = element_of<decltype(of_type)>(); });
  return {x.data(), element, x.shape(0), x.shape(1), x.shape(2), stride(0), stride(1), stride(2)};
}

inline py::array array_like(const py::array& x) {
  return py::array(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
}

}  // namespace mghf::cuda
