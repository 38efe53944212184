// The op `monce` on CUDA: argument checks and the calls of its kernels.
#include "../monce.h"

#include <tuple>

#include "matrices.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

constexpr double kEveryDigit = 0.05;

struct Arguments {
  Matrices query, key;
  MonceOptions options;
};

Arguments check_monce(const Tensor& query, const Tensor& key, double temperature, double epsilon,
                      int64_t iterations, double negative_weight, const std::string& cost,
                      const std::string& plan_gradient, const std::string& precision) {
  Matrices queries = check_matrices(query, "query"), keys = check_matrices(key, "key");
  check_same_shape(key, "key", query, "query");
  STD_TORCH_CHECK(queries.element == keys.element, "key is of another type than query");
  STD_TORCH_CHECK(queries.columns <= kMostTransported, "query has shape ", shape_of(query),
                  "; allowed are up to ", kMostTransported, " columns");
  check_scale(temperature, "temperature");
  check_scale(negative_weight, "negative_weight");
  const bool differentiate_plan = check_plan_gradient(plan_gradient);
  // Similarities are divided by both: where one is small every digit counts.
  const bool once = check_precision(precision) != Precision::float32 && epsilon >= kEveryDigit &&
                    temperature >= kEveryDigit;
  queries.once = keys.once = once;
  const TransportOptions transport = check_transport(cost, epsilon, iterations, std::nullopt);
  return {queries, keys, {transport, temperature, negative_weight, differentiate_plan}};
}

Tensor workspace_for(const Tensor& query, int64_t maps, const MonceOptions& options,
                     bool backward) {
  int64_t bytes = 0;
  check_launch(monce_workspace_bytes(maps, query.size(1), query.size(2), options,
                                     backward, bytes), "monce");
  return new_workspace(query, bytes);
}

std::tuple<Tensor, Tensor> monce_op(const Tensor& query, const Tensor& key, double temperature,
                                    double epsilon, int64_t iterations, double negative_weight,
                                    const std::string& cost, const std::string& plan_gradient,
                                    int64_t kept, const std::string& precision) {
  const Arguments given = check_monce(query, key, temperature, epsilon, iterations,
                                      negative_weight, cost, plan_gradient, precision);
  check_kept(kept, iterations);
  const Launcher launcher(query);
  Tensor losses =
      torch::stable::new_empty(query, {query.size(0), query.size(1)}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(
      query, {query.size(0), 1 + 4 * kept, query.size(1)}, ScalarType::Int);
  if (losses.numel() == 0) return {losses, state};
  Tensor workspace = workspace_for(query, query.size(0), given.options, false);
  check_launch(monce(given.query, given.key, given.options,
                     losses.mutable_data_ptr<float>(),
                     state.mutable_data_ptr<int32_t>(), static_cast<int>(kept),
                     workspace.mutable_data_ptr(), launcher.stream()),
               "monce");
  return {losses, state};
}

// `state` is the one that the forward returned for the same arguments.
Tensor monce_backward_op(const Tensor& grad, const Tensor& query, const Tensor& key,
                         const Tensor& state, double temperature, double epsilon, int64_t iterations,
                         double negative_weight, const std::string& cost,
                         const std::string& plan_gradient,
                         const std::string& precision) {
  const Arguments given = check_monce(query, key, temperature, epsilon, iterations,
                                      negative_weight, cost, plan_gradient, precision);
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == query.size(0) &&
                      grad.size(1) == query.size(1),
                  "grad has shape ", shape_of(grad), "; allowed are the first two dimensions of ",
                  "query, ", shape_of(query));
  check_cuda(state, "state");
  STD_TORCH_CHECK(state.dim() == 3 && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Int && state.size(0) == query.size(0) &&
                      state.size(1) % 4 == 1 && state.size(2) == query.size(1),
                  "state has shape ", shape_of(state),
                  "; allowed is the forward's, (maps, 1 + 4 kept iterations, N) of int32");
  const Matrices upstream = check_matrices(torch::stable::unsqueeze(grad, 2), "grad");
  const Launcher launcher(query);
  Tensor result = torch::stable::new_empty(query, {query.size(0), query.size(1), query.size(2)});
  if (result.numel() == 0) return result;
  const int64_t batch = query.size(0), of_state = state.size(1) * state.size(2);
  const int64_t of_result = query.size(1) * query.size(2) * query.element_size();
  const int64_t maps = monce_backward_maps(batch, query.size(1), query.size(2), given.options);
  const Tensor workspace = workspace_for(query, maps, given.options, true);
  for (int64_t first = 0; first < batch; first += maps) {
    const int64_t count = maps < batch - first ? maps : batch - first;
    check_launch(
        monce_backward(upstream.part(first, count), given.query.part(first, count),
                       given.key.part(first, count), state.const_data_ptr<int32_t>() + first * of_state,
                       static_cast<int>(state.size(1) / 4), given.options,
                       static_cast<char*>(result.mutable_data_ptr()) + first * of_result,
                       workspace.mutable_data_ptr(), launcher.stream()),
        "monce_backward");
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("monce", TORCH_BOX(&monce_op));
  m.impl("monce_backward", TORCH_BOX(&monce_backward_op));
}
