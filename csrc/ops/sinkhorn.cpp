// The native op `sinkhorn`: schemas, argument checks, the calls of its kernels.

#include <cmath>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>

#include "../cpu/sinkhorn.h"
#include "transport.h"

namespace {

using mghf::check_iterations;
using mghf::check_scale;
using mghf::matrix;
using mghf::new_tensor;
using mghf::shape_of;
using mghf::Tensor;

// ---- argument checks ----

void check_square_matrices(const Tensor& tensor, const char* argument) {
  STD_TORCH_CHECK(tensor.is_cpu(), argument, " is not on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, argument,
                  " is not float32");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(1) == tensor.size(2), argument, " has shape ",
                  shape_of(tensor), "; allowed is (B, N, N)");
}

mghf::SinkhornOptions check_sinkhorn(const Tensor& similarity, const std::string& cost,
                                     double epsilon, int64_t iterations,
                                     std::optional<double> tolerance) {
  check_square_matrices(similarity, "similarity");
  check_scale(epsilon, "epsilon");
  check_iterations(iterations);
  STD_TORCH_CHECK(!tolerance || *tolerance >= 0, "tolerance is ", tolerance.value_or(0),
                  "; allowed is None or a number of at least 0");
  return {similarity.size(2), mghf::check_cost(cost), epsilon, iterations, tolerance.has_value(),
          static_cast<float>(tolerance.value_or(0))};
}

// ---- implementations ----

// The number of matrices that have entries.
int64_t count(const Tensor& batch) { return batch.numel() == 0 ? 0 : batch.size(0); }

Tensor sinkhorn(const Tensor& similarity, const std::string& cost, double epsilon,
                int64_t iterations, std::optional<double> tolerance) {
  const auto options = check_sinkhorn(similarity, cost, epsilon, iterations, tolerance);
  const auto& kernels = MGHF_KERNELS_OF(sinkhorn);
  Tensor plan = new_tensor(similarity, similarity.sizes());
  float* out = plan.mutable_data_ptr<float>();
  mghf::for_each(count(similarity), kernels.workspace_bytes(options, false),
                 [&](int64_t b, void* workspace) {
                   kernels.forward(options, matrix(similarity, b),
                                   out + b * options.size * options.size, workspace);
                 });
  return plan;
}

Tensor sinkhorn_backward(const Tensor& grad, const Tensor& similarity, const std::string& cost,
                         double epsilon, int64_t iterations, std::optional<double> tolerance) {
  const auto options = check_sinkhorn(similarity, cost, epsilon, iterations, tolerance);
  check_square_matrices(grad, "grad");
  STD_TORCH_CHECK(grad.size(0) == similarity.size(0) && grad.size(1) == similarity.size(1),
                  "grad has shape ", shape_of(grad), "; allowed is similarity's, ",
                  shape_of(similarity));
  const auto& kernels = MGHF_KERNELS_OF(sinkhorn);
  Tensor grad_similarity = new_tensor(similarity, similarity.sizes());
  float* out = grad_similarity.mutable_data_ptr<float>();
  mghf::for_each(count(similarity), kernels.workspace_bytes(options, true),
                 [&](int64_t b, void* workspace) {
                   kernels.backward(options, matrix(grad, b), matrix(similarity, b),
                                    out + b * options.size * options.size, workspace);
                 });
  return grad_similarity;
}

}  // namespace

// ---- schemas ----

STABLE_TORCH_LIBRARY_FRAGMENT(mghf_native, m) {
  m.def(
      "sinkhorn(Tensor similarity, str cost, float epsilon, int iterations, float? tolerance)"
      " -> Tensor");
  m.def(
      "sinkhorn_backward(Tensor grad, Tensor similarity, str cost, float epsilon, int iterations,"
      " float? tolerance) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mghf_native, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward));
}
