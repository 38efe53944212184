// Checks of the ops' options: numbers and names, which are the same for the CPU and for CUDA.
#pragma once

#include <optional>
#include <string>

#include "checks.h"
#include "coupling.h"
#include "precision.h"
#include "transport.h"

namespace mghf {

inline Precision check_precision(const std::string& precision) {
  if (precision == "float32") return Precision::float32;
  if (precision == "tf32") return Precision::tf32;
  STD_TORCH_CHECK(precision == "bfloat16", "precision is '", precision,
                  "'; allowed are 'float32', 'tf32', 'bfloat16'");
  return Precision::bfloat16;
}

// ---- coupling ----

inline Activation check_activation(const std::string& activation) {
  if (activation == "relu6") return Activation::relu6;
  if (activation == "softplus") return Activation::softplus;
  STD_TORCH_CHECK(activation == "leaky_relu", "activation is '", activation,
                  "'; allowed are 'relu6', 'softplus', 'leaky_relu'");
  return Activation::leaky_relu;
}

// Checks the options of a block for `x`; `most_channels` is 0 where any number of them is allowed.
inline CouplingShape check_coupling(const Tensor& x, int64_t channels, int64_t kernel,
                                    const std::string& activation, double clamp,
                                    int64_t most_channels = 0) {
  const bool few_enough = most_channels == 0 || channels <= most_channels;
  const std::string range =
      most_channels == 0 ? "at least 2" : "2 to " + std::to_string(most_channels);
  STD_TORCH_CHECK(channels >= 2 && channels % 2 == 0 && few_enough, "channels is ", channels,
                  "; allowed is an even number of ", range);
  STD_TORCH_CHECK(kernel == 1 || kernel == 3, "kernel is ", kernel, "; allowed are 1 and 3");
  STD_TORCH_CHECK(clamp >= 0, "clamp is ", clamp, "; allowed is 0 for none or a positive number");
  return {x.size(1), channels, kernel, check_activation(activation), static_cast<float>(clamp)};
}

inline void check_coupling_weights(const Tensor& weights, const CouplingShape& shape) {
  const int64_t count = coupling_weight_count(shape);
  STD_TORCH_CHECK(weights.dim() == 1 && weights.is_contiguous() && weights.size(0) == count,
                  "weights has shape ", shape_of(weights), "; allowed is a contiguous (", count,
                  ")");
}

// Checks the gradient of the features, whose number of channels may differ from that of x.
inline void check_coupling_gradient(const Tensor& grad, const Tensor& x, int64_t channels) {
  STD_TORCH_CHECK(grad.size(0) == x.size(0) && grad.size(1) == channels &&
                      grad.size(2) == x.size(2) && grad.size(3) == x.size(3),
                  "grad has shape ", shape_of(grad), "; allowed is x's, ", shape_of(x), ", with ",
                  channels, " channels");
}

// ---- sinkhorn and monce ----

// Beyond these bounds the number or its inverse is not a normal float32.
inline void check_scale(double value, const char* argument) {
  STD_TORCH_CHECK(value >= 1e-30 && value <= 1e30, argument, " is ", value,
                  "; allowed is a finite number above 0 (from 1e-30 to 1e30)");
}

inline TransportCost check_cost(const std::string& cost) {
  if (cost == "hard") return TransportCost::hard;
  if (cost == "easy") return TransportCost::easy;
  STD_TORCH_CHECK(cost == "exp", "cost is '", cost, "'; allowed are 'hard', 'easy', 'exp'");
  return TransportCost::exp;
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

// Whether `monce` differentiates its plan.
inline bool check_plan_gradient(const std::string& plan_gradient) {
  STD_TORCH_CHECK(plan_gradient == "exact" || plan_gradient == "detach", "plan_gradient is '",
                  plan_gradient, "'; allowed are 'exact', 'detach'");
  return plan_gradient == "exact";
}

// How many iterations the forward of `monce` keeps for its backward.
inline void check_kept(int64_t kept, int64_t iterations) {
  STD_TORCH_CHECK(kept >= 0 && kept <= iterations, "kept is ", kept, "; allowed is 0 to ",
                  iterations);
}

// ---- content_style ----

inline void check_top_m(int64_t top_m, int64_t channels) {
  STD_TORCH_CHECK(top_m >= 0 && top_m <= channels, "top_m is ", top_m, "; allowed is 0 to ",
                  channels);
}

}  // namespace mghf
