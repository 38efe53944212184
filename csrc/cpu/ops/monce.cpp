// The op `monce` on the CPU: argument checks and the calls of its kernels.

#include <string>
#include <tuple>

#include "../monce.h"
#include "arguments.h"

namespace {

using mghf::check_float32;
using mghf::check_same_shape;
using mghf::check_scale;
using mghf::matrix_view;
using mghf::new_tensor;
using mghf::shape_of;
using mghf::Tensor;

// ---- argument checks ----

mghf::MonceOptions check_monce(const Tensor& query, const Tensor& key, double temperature,
                               double epsilon, int64_t iterations, double negative_weight,
                               const std::string& cost, const std::string& plan_gradient) {
  check_float32(query, "query", 3);
  check_float32(key, "key", 3);
  check_same_shape(key, "key", query, "query");
  check_scale(temperature, "temperature");
  check_scale(negative_weight, "negative_weight");
  const bool differentiate_plan = mghf::check_plan_gradient(plan_gradient);
  return {{mghf::check_transport(cost, epsilon, iterations, std::nullopt), query.size(1)},
          query.size(2),
          temperature,
          negative_weight,
          differentiate_plan};
}

// ---- implementations ----

// The number of maps that have patches.
int64_t count(const Tensor& batch) { return batch.size(1) == 0 ? 0 : batch.size(0); }

mghf::KeptIterates kept_of(int32_t* state, int64_t b, int64_t slots, int64_t patches) {
  return {state + b * (1 + 4 * slots) * patches, slots};
}

std::tuple<Tensor, Tensor> monce(const Tensor& query, const Tensor& key, double temperature,
                                 double epsilon, int64_t iterations, double negative_weight,
                                 const std::string& cost, const std::string& plan_gradient,
                                 int64_t kept, const std::string& precision) {
  mghf::check_precision(precision);
  const auto options = check_monce(query, key, temperature, epsilon, iterations, negative_weight,
                                   cost, plan_gradient);
  mghf::check_kept(kept, iterations);
  const auto& kernels = MGHF_KERNELS_OF(monce);
  const int64_t patches = query.size(1), shape[] = {query.size(0), patches};
  Tensor losses = new_tensor(query, shape);
  Tensor state =
      new_tensor(query, {query.size(0), 1 + 4 * kept, patches}, mghf::ScalarType::Int);
  float* out = losses.mutable_data_ptr<float>();
  int32_t* const left = state.mutable_data_ptr<int32_t>();
  mghf::for_each(count(query), kernels.workspace_bytes(options, false),
                 [&](int64_t b, void* workspace) {
                   kernels.forward(options, matrix_view(query, b), matrix_view(key, b),
                                   out + b * patches, kept_of(left, b, kept, patches), workspace);
                 });
  return {losses, state};
}

// `state` is the one that the forward returned for the same arguments.
Tensor monce_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                      const Tensor& state, double temperature, double epsilon, int64_t iterations,
                      double negative_weight, const std::string& cost,
                      const std::string& plan_gradient, const std::string& precision) {
  mghf::check_precision(precision);
  const auto options = check_monce(query, key, temperature, epsilon, iterations, negative_weight,
                                   cost, plan_gradient);
  check_float32(grad, "grad", 2);
  STD_TORCH_CHECK(grad.size(0) == query.size(0) && grad.size(1) == query.size(1),
                  "grad has shape ", shape_of(grad), "; allowed are the first two dimensions of ",
                  "query, ", shape_of(query));
  const auto& kernels = MGHF_KERNELS_OF(monce);
  const int64_t patches = query.size(1), slots = (state.size(1) - 1) / 4;
  STD_TORCH_CHECK(state.is_cpu() && state.scalar_type() == mghf::ScalarType::Int &&
                      state.is_contiguous() && state.dim() == 3 &&
                      state.size(0) == query.size(0) && state.size(1) == 1 + 4 * slots &&
                      state.size(2) == patches,
                  "state has shape ", shape_of(state),
                  "; allowed is the forward's, (maps, 1 + 4 kept iterations, N) of int32");
  int32_t* const left = const_cast<int32_t*>(state.const_data_ptr<int32_t>());  // is only read
  Tensor grad_query = new_tensor(query, query.sizes());
  float* out = grad_query.mutable_data_ptr<float>();
  const float* grads = grad.const_data_ptr<float>();
  mghf::for_each(count(query), kernels.workspace_bytes(options, true),
                 [&](int64_t b, void* workspace) {
                   kernels.backward(options, {grads + b * grad.stride(0), grad.stride(1)},
                                    matrix_view(query, b), matrix_view(key, b),
                                    kept_of(left, b, slots, patches),
                                    out + b * patches * query.size(2), workspace);
                 });
  return grad_query;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("monce", TORCH_BOX(&monce));
  m.impl("monce_backward", TORCH_BOX(&monce_backward));
}
