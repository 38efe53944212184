// The op `patches` on CUDA: argument checks and the calls of its kernels.
#include "../patches.h"

#include <tuple>

#include "arguments.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

const float* check_parameter(const Tensor& tensor, const char* argument, int64_t rows,
                             int64_t columns) {
  check_float32(tensor, argument, columns < 0 ? 1 : 2);
  STD_TORCH_CHECK(tensor.is_contiguous(), argument, " is not contiguous");
  STD_TORCH_CHECK(tensor.size(0) == rows && (columns < 0 || tensor.size(1) == columns), argument,
                  " has shape ", shape_of(tensor), ", which does not fit the other weights");
  return tensor.const_data_ptr<float>();
}

// The projection without biases and options.
Projection check_weights(const Tensor& weight1, const Tensor& weight2, int64_t patch_size) {
  constexpr int64_t kMost = int64_t{1} << 24;
  check_float32(weight1, "weight1", 2);
  check_float32(weight2, "weight2", 2);
  Projection p{};
  p.patch_size = patch_size;
  p.hidden = weight1.size(0);
  p.dimension = weight2.size(0);
  STD_TORCH_CHECK(p.hidden < kMost && p.dimension < kMost, "weight1 has shape ", shape_of(weight1),
                  " and weight2 ", shape_of(weight2), "; allowed are less than 2^24 rows");
  p.weight1 = check_parameter(weight1, "weight1", p.hidden, patch_size * patch_size);
  p.weight2 = check_parameter(weight2, "weight2", p.dimension, p.hidden);
  return p;
}

// The projection without its biases.
Projection check_patches(const Tensor& x, const char* argument, const Tensor& weight1,
                         const Tensor& weight2, int64_t patch_size, int64_t stride,
                         const std::string& precision) {
  constexpr int64_t kMost = int64_t{1} << 24;
  check_image(x, argument);
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= x.size(2) && patch_size <= x.size(3) &&
                      patch_size <= 4096,
                  "patch_size is ", patch_size, "; allowed is 1 to the height and width of ",
                  argument, ", ", x.size(2), " x ", x.size(3), ", and 4096");
  STD_TORCH_CHECK(stride >= 1, "stride is ", stride, "; allowed is at least 1");
  STD_TORCH_CHECK(
      x.size(2) < kMost && x.size(3) < kMost && x.size(2) * x.size(3) < int64_t{1} << 31, argument,
      " has shape ", shape_of(x), "; allowed are maps of less than 2^31 pixels");
  Projection p = check_weights(weight1, weight2, patch_size);
  p.precision = check_precision(precision);
  p.stride = stride;
  return p;
}

// Lets the projection use what is packed.
void take_packed(Projection& p, const Tensor& packed, const Tensor& weight1) {
  check_cuda(packed, "packed");
  check_same_device(packed, "packed", weight1, "weight1");
  const int64_t bytes = patches_packed_bytes(p);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte, "packed is not uint8");
  STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.size(0) == bytes,
                  "packed has shape ", shape_of(packed), "; allowed is a contiguous (", bytes,
                  "), from patches_pack for the same weights");
  p.is_packed = true;
  p.packed = packed.mutable_data_ptr();
}

EmbeddingGradient check_gradient(const Projection& p, const Tensor& x, const Tensor& grad,
                                 const Tensor& embedding, const Tensor& state) {
  const int64_t maps = x.size(0) * x.size(1), patches = p.patches(x.size(2), x.size(3));
  check_float32(grad, "grad", 3);
  check_float32(embedding, "embedding", 3);
  STD_TORCH_CHECK(embedding.size(0) == maps && embedding.size(1) == patches &&
                      embedding.size(2) == p.dimension && embedding.is_contiguous(),
                  "embedding is not what the forward returned");
  check_cuda(state, "state");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Int && state.dim() == 3 &&
                      state.size(0) == patches && state.size(1) == p.state_words() &&
                      state.size(2) == maps &&
                      (state.numel() == 0 || step_of_state(state) > 0),
                  "state is not what the forward returned");
  check_same_shape(grad, "grad", embedding, "embedding");
  return {grad.const_data_ptr<float>(), grad.stride(0), grad.stride(1),
          grad.stride(2), embedding.const_data_ptr<float>(),
          state.const_data_ptr<int32_t>(), step_of_state(state)};
}

std::tuple<Tensor, Tensor> project(const Tensor& x, const Tensor& weight1, const Tensor& bias1,
                                   const Tensor& weight2, const Tensor& bias2,
                                   const Tensor* packed, int64_t patch_size, int64_t stride,
                                   const std::string& precision) {
  Projection p = check_patches(x, "x", weight1, weight2, patch_size, stride, precision);
  p.bias1 = check_parameter(bias1, "bias1", p.hidden, -1);
  p.bias2 = check_parameter(bias2, "bias2", p.dimension, -1);
  if (packed != nullptr) take_packed(p, *packed, weight1);
  const int64_t maps = x.size(0) * x.size(1), number = p.patches(x.size(2), x.size(3));
  const Launcher launcher(x);
  Tensor embedding = torch::stable::new_empty(x, {maps, number, p.dimension}, ScalarType::Float);
  Tensor state = torch::stable::new_empty(x, {number, p.state_words(), maps}, ScalarType::Int);
  const Tensor workspace = new_workspace(x, patches_workspace_bytes(p));
  with_image(x, "x", [&](const auto& image) {
    check_launch(patches(image, p, embedding.mutable_data_ptr<float>(),
                         state.mutable_data_ptr<int32_t>(),
                         workspace.mutable_data_ptr(), launcher.stream()),
                 "patches");
  });
  return {embedding, state};
}

std::tuple<Tensor, Tensor> patches_op(const Tensor& x, const Tensor& weight1, const Tensor& bias1,
                                      const Tensor& weight2, const Tensor& bias2,
                                      int64_t patch_size, int64_t stride,
                                      const std::string& precision) {
  return project(x, weight1, bias1, weight2, bias2, nullptr, patch_size, stride, precision);
}

Tensor patches_pack_op(const Tensor& weight1, const Tensor& weight2, int64_t patch_size,
                       int64_t stride) {
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= 4096, "patch_size is ", patch_size,
                  "; allowed is 1 to 4096");
  STD_TORCH_CHECK(stride >= 1, "stride is ", stride, "; allowed is at least 1");
  Projection p = check_weights(weight1, weight2, patch_size);
  p.stride = stride;
  const Launcher launcher(weight1);
  Tensor packed =
      torch::stable::new_empty(weight1, {patches_packed_bytes(p)}, ScalarType::Byte);
  p.packed = packed.mutable_data_ptr();
  check_launch(patches_pack(p, launcher.stream()), "patches_pack");
  return packed;
}

std::tuple<Tensor, Tensor> patches_packed_op(const Tensor& x, const Tensor& weight1,
                                             const Tensor& bias1, const Tensor& weight2,
                                             const Tensor& bias2, const Tensor& packed,
                                             int64_t patch_size, int64_t stride,
                                             const std::string& precision) {
  return project(x, weight1, bias1, weight2, bias2, &packed, patch_size, stride, precision);
}

void image_gradient(const Tensor& grad_x, const char* argument, bool add, const Tensor& grad,
                    const Tensor& embedding, const Tensor& state, const Tensor& weight1,
                    const Tensor& weight2, const Tensor* packed, int64_t patch_size,
                    int64_t stride, const std::string& precision) {
  Projection p = check_patches(grad_x, argument, weight1, weight2, patch_size, stride, precision);
  if (packed != nullptr) take_packed(p, *packed, weight1);
  const EmbeddingGradient gradient = check_gradient(p, grad_x, grad, embedding, state);
  const Launcher launcher(grad_x);
  const Tensor workspace = new_workspace(
      grad, patches_backward_workspace_bytes(p, grad_x.size(0) * grad_x.size(1), grad_x.size(2),
                                             grad_x.size(3)));
  with_image(grad_x, argument, [&]<class T>(const Image<T>&) {
    check_launch(patches_backward(mutable_image_of<T>(grad_x), add, p, gradient,
                                  workspace.mutable_data_ptr(), launcher.stream()),
                 "patches_backward");
  });
}

Tensor patches_backward_op(const Tensor& grad, const Tensor& embedding, const Tensor& state,
                           const Tensor& x, const Tensor& weight1, const Tensor& weight2,
                           int64_t patch_size, int64_t stride,
                           const std::string& precision) {
  check_image(x, "x");
  const Tensor grad_x = new_image_like(x, x.size(1));
  image_gradient(grad_x, "x", false, grad, embedding, state, weight1, weight2, nullptr, patch_size,
                 stride, precision);
  return grad_x;
}

void patches_backward_add_op(Tensor grad_x, const Tensor& grad, const Tensor& embedding,
                             const Tensor& state, const Tensor& weight1, const Tensor& weight2,
                             int64_t patch_size, int64_t stride,
                             const std::string& precision) {
  image_gradient(grad_x, "grad_x", true, grad, embedding, state, weight1, weight2, nullptr,
                 patch_size, stride, precision);
}

void patches_packed_backward_add_op(Tensor grad_x, const Tensor& grad, const Tensor& embedding,
                                    const Tensor& state, const Tensor& weight1,
                                    const Tensor& weight2, const Tensor& packed,
                                    int64_t patch_size, int64_t stride,
                                    const std::string& precision) {
  image_gradient(grad_x, "grad_x", true, grad, embedding, state, weight1, weight2, &packed,
                 patch_size, stride, precision);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patches_backward_weights_op(
    const Tensor& grad, const Tensor& embedding, const Tensor& state, const Tensor& x,
    const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, int64_t patch_size,
    int64_t stride, const std::string& precision) {
  Projection p = check_patches(x, "x", weight1, weight2, patch_size, stride, precision);
  p.bias1 = check_parameter(bias1, "bias1", p.hidden, -1);
  const EmbeddingGradient gradient = check_gradient(p, x, grad, embedding, state);
  const Launcher launcher(x);
  Tensor weight1_grad = torch::stable::new_empty(weight1, {p.hidden, p.pixels()});
  Tensor bias1_grad = torch::stable::new_empty(weight1, {p.hidden});
  Tensor weight2_grad = torch::stable::new_empty(weight1, {p.dimension, p.hidden});
  Tensor bias2_grad = torch::stable::new_empty(weight1, {p.dimension});
  const Tensor workspace =
      new_workspace(grad, patches_backward_weights_workspace_bytes(p, x.size(0) * x.size(1),
                                                                   x.size(2), x.size(3)));
  with_image(x, "x", [&](const auto& image) {
    const ParameterGradients result{
        weight1_grad.mutable_data_ptr<float>(), bias1_grad.mutable_data_ptr<float>(),
        weight2_grad.mutable_data_ptr<float>(), bias2_grad.mutable_data_ptr<float>()};
    check_launch(patches_backward_weights(image, p, gradient, result, workspace.mutable_data_ptr(),
                                          launcher.stream()),
                 "patches_backward_weights");
  });
  return {weight1_grad, bias1_grad, weight2_grad, bias2_grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("patches", TORCH_BOX(&patches_op));
  m.impl("patches_backward", TORCH_BOX(&patches_backward_op));
  m.impl("patches_backward_add_", TORCH_BOX(&patches_backward_add_op));
  m.impl("patches_pack", TORCH_BOX(&patches_pack_op));
  m.impl("patches_packed", TORCH_BOX(&patches_packed_op));
  m.impl("patches_packed_backward_add_", TORCH_BOX(&patches_packed_backward_add_op));
  m.impl("patches_backward_weights", TORCH_BOX(&patches_backward_weights_op));
}
