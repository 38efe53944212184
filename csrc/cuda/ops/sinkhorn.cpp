// The op `sinkhorn` on CUDA: argument checks and the calls of its kernels.
#include "../sinkhorn.h"

#include "matrices.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

Matrices check_similarity(const Tensor& similarity) {
  const Matrices matrices = check_matrices(similarity, "similarity");
  STD_TORCH_CHECK(similarity.size(1) == similarity.size(2), "similarity has shape ",
                  shape_of(similarity), "; allowed is (B, N, N)");
  return matrices;
}

Tensor workspace_for(const Tensor& similarity, int64_t iterations, bool backward) {
  int64_t bytes = 0;
  check_launch(sinkhorn_workspace_bytes(similarity.size(0), similarity.size(1), iterations,
                                        backward, bytes),
               "sinkhorn");
  return new_workspace(similarity, bytes);
}

Tensor sinkhorn_op(const Tensor& similarity, const std::string& cost, double epsilon,
                   int64_t iterations, std::optional<double> tolerance) {
  const Matrices matrices = check_similarity(similarity);
  const TransportOptions options = check_transport(cost, epsilon, iterations, tolerance);
  const Launcher launcher(similarity);
  Tensor plan = torch::stable::new_empty(
      similarity, {matrices.batch, matrices.rows, matrices.columns});
  if (similarity.numel() == 0) return plan;
  Tensor workspace = workspace_for(similarity, iterations, false);
  check_launch(sinkhorn(matrices, options, plan.mutable_data_ptr(), workspace.mutable_data_ptr(),
                        launcher.stream()),
               "sinkhorn");
  return plan;
}

Tensor sinkhorn_backward_op(const Tensor& grad, const Tensor& similarity, const std::string& cost,
                            double epsilon, int64_t iterations, std::optional<double> tolerance) {
  const Matrices matrices = check_similarity(similarity);
  const Matrices upstream = check_matrices(grad, "grad");
  check_same_shape(grad, "grad", similarity, "similarity");
  const TransportOptions options = check_transport(cost, epsilon, iterations, tolerance);
  const Launcher launcher(similarity);
  Tensor result = torch::stable::new_empty(
      similarity, {matrices.batch, matrices.rows, matrices.columns});
  if (similarity.numel() == 0) return result;
  Tensor workspace = workspace_for(similarity, iterations, true);
  check_launch(sinkhorn_backward(upstream, matrices, options, result.mutable_data_ptr(),
                                 workspace.mutable_data_ptr(), launcher.stream()),
               "sinkhorn_backward");
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("sinkhorn", TORCH_BOX(&sinkhorn_op));
  m.impl("sinkhorn_backward", TORCH_BOX(&sinkhorn_backward_op));
}
