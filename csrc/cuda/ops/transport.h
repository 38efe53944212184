// Arguments that `sinkhorn` and `monce` share.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "../sinkhorn.h"
#include "arguments.h"

namespace mghf::cuda {

inline TransportCost check_cost(const std::string& cost) {
  if (cost == "hard") return TransportCost::hard;
  if (cost == "easy") return TransportCost::easy;
  STD_TORCH_CHECK(cost == "exp", "cost is '", cost, "'; allowed are 'hard', 'easy', 'exp'");
  return TransportCost::exp;
}

// Beyond these bounds the number or its inverse is no normal float32.
inline void check_scale(double value, const char* argument) {
  STD_TORCH_CHECK(value >= 1e-30 && value <= 1e30, argument, " is ", value,
                  "; allowed is a finite number above 0 (from 1e-30 to 1e30)");
}

inline TransportOptions check_transport(const std::string& cost, double epsilon,
                                        int64_t iterations, std::optional<double> tolerance) {
  check_scale(epsilon, "epsilon");
  STD_TORCH_CHECK(iterations >= 1 && iterations <= 1'000'000, "iterations is ", iterations,
                  "; allowed is 1 to 1000000");
  STD_TORCH_CHECK(!tolerance || *tolerance >= 0, "tolerance is ", tolerance.value_or(0),
                  "; allowed is None or a number of at least 0");
  return {check_cost(cost), epsilon, iterations, tolerance.has_value(),
          static_cast<float>(tolerance.value_or(0))};
}

// Of any size that the kernels take, (B, rows, columns).
inline Matrices check_matrices(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cuda(), argument, " is not on a CUDA device");
  STD_TORCH_CHECK(tensor.dim() == 3, argument, " has shape ", shape_of(tensor),
                  "; allowed are 3 dimensions");
  STD_TORCH_CHECK(tensor.size(1) <= kMostTransported, argument, " has shape ", shape_of(tensor),
                  "; allowed are up to ", kMostTransported, " rows");
  Element element = Element::float32;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      break;
    case ScalarType::Half:
      element = Element::float16;
      break;
    case ScalarType::BFloat16:
      element = Element::bfloat16;
      break;
    default:
      STD_TORCH_CHECK(false, argument, " is none of float32, float16 and bfloat16");
  }
  return {tensor.const_data_ptr(), element,          tensor.size(0),   tensor.size(1),
          tensor.size(2),          tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline void check_same_shape(const Tensor& tensor, const char* argument, const Tensor& other,
                             const char* other_argument) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == other.size(d);
  STD_TORCH_CHECK(same, argument, " has shape ", shape_of(tensor), "; allowed is ", other_argument,
                  "'s, ", shape_of(other));
}

}  // namespace mghf::cuda
