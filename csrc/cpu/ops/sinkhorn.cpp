// The op `sinkhorn` on the CPU: argument checks and the calls of its kernels.

#include <optional>
#include <string>

#include "../sinkhorn.h"
#include "arguments.h"

namespace {

using mghf::matrix_view;
using mghf::new_tensor;
using mghf::shape_of;
using mghf::Tensor;

// ---- argument checks ----

void check_square_matrices(const Tensor& tensor, const char* argument) {
  mghf::check_cpu(tensor, argument);
  STD_TORCH_CHECK(tensor.scalar_type() == mghf::ScalarType::Float, argument, " is not float32");
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(1) == tensor.size(2), argument, " has shape ",
                  shape_of(tensor), "; allowed is (B, N, N)");
}

mghf::SinkhornOptions check_sinkhorn(const Tensor& similarity, const std::string& cost,
                                     double epsilon, int64_t iterations,
                                     std::optional<double> tolerance) {
  check_square_matrices(similarity, "similarity");
  return {mghf::check_transport(cost, epsilon, iterations, tolerance), similarity.size(2)};
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
                   kernels.forward(options, matrix_view(similarity, b),
                                   out + b * options.size * options.size, workspace);
                 });
  return plan;
}

Tensor sinkhorn_backward(const Tensor& grad, const Tensor& similarity, const std::string& cost,
                         double epsilon, int64_t iterations, std::optional<double> tolerance) {
  const auto options = check_sinkhorn(similarity, cost, epsilon, iterations, tolerance);
  check_square_matrices(grad, "grad");
  mghf::check_same_shape(grad, "grad", similarity, "similarity");
  const auto& kernels = MGHF_KERNELS_OF(sinkhorn);
  Tensor grad_similarity = new_tensor(similarity, similarity.sizes());
  float* out = grad_similarity.mutable_data_ptr<float>();
  mghf::for_each(count(similarity), kernels.workspace_bytes(options, true),
                 [&](int64_t b, void* workspace) {
                   kernels.backward(options, matrix_view(grad, b), matrix_view(similarity, b),
                                    out + b * options.size * options.size, workspace);
                 });
  return grad_similarity;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward));
}
