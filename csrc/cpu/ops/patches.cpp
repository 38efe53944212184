// The op `patches` on the CPU: argument checks and the calls of its kernels.

#include <algorithm>
#include <tuple>

#include "../patches.h"
#include "arguments.h"

namespace {

using mghf::check_float32;
using mghf::check_same_shape;
using mghf::new_tensor;
using mghf::PatchesGradient;
using mghf::PatchesOptions;
using mghf::shape_of;
using mghf::Tensor;
using mghf::ScalarType;

// ---- argument checks ----

const float* check_parameter(const Tensor& tensor, const char* argument, int64_t rows,
                             int64_t columns) {
  check_float32(tensor, argument, columns < 0 ? 1 : 2);
  STD_TORCH_CHECK(tensor.is_contiguous(), argument, " is not contiguous");
  STD_TORCH_CHECK(tensor.size(0) == rows && (columns < 0 || tensor.size(1) == columns), argument,
                  " has shape ", shape_of(tensor), ", which does not fit the other weights");
  return tensor.const_data_ptr<float>();
}

PatchesOptions check_patches(const Tensor& x, const Tensor& weight1, const Tensor& weight2,
                             int64_t patch_size, int64_t stride) {
  mghf::check_image(x, "x");
  STD_TORCH_CHECK(patch_size >= 1 && patch_size <= x.size(2) && patch_size <= x.size(3),
                  "patch_size is ", patch_size, "; allowed is 1 to the height and width of x, ",
                  x.size(2), " x ", x.size(3));
  STD_TORCH_CHECK(stride >= 1, "stride is ", stride, "; allowed is at least 1");
  check_float32(weight1, "weight1", 2);
  check_float32(weight2, "weight2", 2);
  PatchesOptions options{};
  options.patch_size = patch_size;
  options.stride = stride;
  options.height = x.size(2);
  options.width = x.size(3);
  options.rows = (x.size(2) - patch_size) / stride + 1;
  options.columns = (x.size(3) - patch_size) / stride + 1;
  options.maps = x.size(0) * x.size(1);
  options.hidden = weight1.size(0);
  options.dimension = weight2.size(0);
  check_parameter(weight1, "weight1", options.hidden, patch_size * patch_size);
  options.weight2 = check_parameter(weight2, "weight2", options.dimension, options.hidden);
  return options;
}

PatchesGradient check_gradient(const PatchesOptions& options, const Tensor& grad,
                               const Tensor& embedding, const Tensor& state) {
  check_float32(grad, "grad", 3);
  check_float32(embedding, "embedding", 3);
  STD_TORCH_CHECK(embedding.size(0) == options.maps && embedding.size(1) == options.patches() &&
                      embedding.size(2) == options.dimension && embedding.is_contiguous(),
                  "embedding is not what the forward returned");
  STD_TORCH_CHECK(state.is_cpu() && state.scalar_type() == ScalarType::Int && state.dim() == 3 &&
                      state.size(0) == options.patches() &&
                      state.size(1) == options.state_words() && state.size(2) == options.maps &&
                      (state.numel() == 0 || mghf::step_of_state(state) > 0),
                  "state is not what the forward returned");
  check_same_shape(grad, "grad", embedding, "embedding");
  return {{grad.const_data_ptr<float>(), grad.stride(0), grad.stride(1), grad.stride(2)},
          embedding.const_data_ptr<float>(),
          state.const_data_ptr<int32_t>(),
          mghf::step_of_state(state)};
}

// ---- implementations ----

// Floats use the kernels without pairs, because GCC compiles those better.
const auto& kernels_of(const PatchesOptions& options) {
  return options.pairs ? MGHF_BFLOAT16_KERNELS_OF(patches) : MGHF_KERNELS_OF(patches);
}

int64_t groups(const PatchesOptions& options) {
  const int64_t lanes = kernels_of(options).lanes;
  return (options.maps + lanes - 1) / lanes;
}

// Whether products of bfloat16 are exact in the forward: a rounded weight would flip the signs of
// hidden units near 0, and with them the gradient.
bool takes_pairs(const Tensor& image, const Tensor& weight1, int64_t patch_size) {
  if (!MGHF_BFLOAT16_KERNELS_OF(patches).pairs || image.scalar_type() != ScalarType::BFloat16 ||
      patch_size % 2 != 0) {
    return false;
  }
  const float* weight = weight1.const_data_ptr<float>();
  return std::all_of(weight, weight + weight1.numel(), [](float value) {
    return (__builtin_bit_cast(uint32_t, value) & 0xffff) == 0;
  });
}

// (hidden, row, column) -> (row, hidden, column), so that what a kernel reads at a time is
// contiguous.
Tensor by_patch_row(const Tensor& weight1, int64_t size) {
  const int64_t hidden = weight1.size(0);
  Tensor result = new_tensor(weight1, {size, hidden, size});
  const float* in = weight1.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  for (int64_t unit = 0; unit < hidden; ++unit) {
    for (int64_t row = 0; row < size; ++row) {
      std::copy_n(in + (unit * size + row) * size, size, out + (row * hidden + unit) * size);
    }
  }
  return result;
}

float pair(float first, float second) {
  const uint32_t low = torch::headeronly::BFloat16(first).x;
  const uint32_t high = torch::headeronly::BFloat16(second).x;
  return __builtin_bit_cast(float, low | high << 16);
}

// The same as pairs of columns, for the forward.
Tensor column_pairs(const Tensor& weight1, int64_t size) {
  const int64_t hidden = weight1.size(0);
  Tensor result = new_tensor(weight1, {size, hidden, size / 2});
  const float* in = weight1.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  for (int64_t row = 0; row < size; ++row) {
    for (int64_t unit = 0; unit < hidden; ++unit) {
      const float* columns = in + (unit * size + row) * size;
      for (int64_t k = 0; k < size; k += 2) *out++ = pair(columns[k], columns[k + 1]);
    }
  }
  return result;
}

// (row, column, pair of hidden units), for the gradient of the image.
Tensor unit_pairs(const Tensor& weight1, int64_t size) {
  const int64_t hidden = weight1.size(0), words = (hidden + 1) / 2, pixels = size * size;
  Tensor result = new_tensor(weight1, {pixels + mghf::kPairSlack, words});
  const float* in = weight1.const_data_ptr<float>();
  float* out = result.mutable_data_ptr<float>();
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    for (int64_t unit = 0; unit < hidden; unit += 2) {
      const float* weight = in + unit * pixels + pixel;
      *out++ = pair(*weight, unit + 1 < hidden ? weight[pixels] : 0.0f);
    }
  }
  std::fill_n(out, mghf::kPairSlack * words, 0.0f);
  return result;
}

std::tuple<Tensor, Tensor> patches(const Tensor& x, const Tensor& weight1, const Tensor& bias1,
                                   const Tensor& weight2, const Tensor& bias2, int64_t patch_size,
                                   int64_t stride, const std::string& precision) {
  mghf::check_precision(precision);
  PatchesOptions options = check_patches(x, weight1, weight2, patch_size, stride);
  options.bias1 = check_parameter(bias1, "bias1", options.hidden, -1);
  options.bias2 = check_parameter(bias2, "bias2", options.dimension, -1);
  options.pairs = takes_pairs(x, weight1, patch_size);
  const auto& kernels = kernels_of(options);
  const Tensor packed =
      options.pairs ? column_pairs(weight1, patch_size) : by_patch_row(weight1, patch_size);
  options.weight1 = packed.const_data_ptr<float>();

  Tensor embedding = new_tensor(weight1, {options.maps, options.patches(), options.dimension});
  Tensor state = new_tensor(weight1, {options.patches(), options.state_words(), options.maps},
                            ScalarType::Int);
  const mghf::ImageView view = mghf::read_view(x, "x");
  float* embedding_data = embedding.mutable_data_ptr<float>();
  int32_t* state_data = state.mutable_data_ptr<int32_t>();
  mghf::for_each(groups(options) * options.rows, kernels.forward_bytes(options),
                 [&](int64_t task, void* workspace) {
                   kernels.forward(options, view, task, embedding_data, state_data, workspace);
                 });
  return {embedding, state};
}

void image_gradient(const Tensor& grad_x, bool add, const Tensor& grad, const Tensor& embedding,
                    const Tensor& state, const Tensor& weight1, const Tensor& weight2,
                    int64_t patch_size, int64_t stride) {
  PatchesOptions options = check_patches(grad_x, weight1, weight2, patch_size, stride);
  const PatchesGradient gradient = check_gradient(options, grad, embedding, state);
  options.pairs = takes_pairs(grad_x, weight1, patch_size);
  const auto& kernels = kernels_of(options);
  const Tensor packed =
      options.pairs ? unit_pairs(weight1, patch_size) : by_patch_row(weight1, patch_size);
  options.weight1 = packed.const_data_ptr<float>();

  Tensor grad_hidden = new_tensor(
      weight1, {groups(options), options.patches(), options.hidden_words(), kernels.lanes});
  float* grad_hidden_data = grad_hidden.mutable_data_ptr<float>();
  mghf::for_each(groups(options) * options.rows, kernels.hidden_bytes(options),
                 [&](int64_t task, void* workspace) {
                   kernels.hidden(options, gradient, task, grad_hidden_data, workspace);
                 });
  const mghf::MutableImageView view = mghf::write_view(grad_x, "grad_x");
  mghf::for_each(groups(options) * ((options.height + stride - 1) / stride),
                 kernels.image_bytes(options), [&](int64_t task, void* workspace) {
                   kernels.image(options, grad_hidden_data, view, add, task, workspace);
                 });
}

Tensor patches_backward(const Tensor& grad, const Tensor& embedding, const Tensor& state,
                        const Tensor& x, const Tensor& weight1, const Tensor& weight2,
                        int64_t patch_size, int64_t stride, const std::string& precision) {
  mghf::check_precision(precision);
  mghf::check_image(x, "x");
  Tensor grad_x = mghf::new_image_like(x, x.size(1));
  image_gradient(grad_x, false, grad, embedding, state, weight1, weight2, patch_size, stride);
  return grad_x;
}

void patches_backward_add_(Tensor grad_x, const Tensor& grad, const Tensor& embedding,
                           const Tensor& state, const Tensor& weight1, const Tensor& weight2,
                           int64_t patch_size, int64_t stride,
                           const std::string& precision) {
  mghf::check_precision(precision);
  image_gradient(grad_x, true, grad, embedding, state, weight1, weight2, patch_size, stride);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patches_backward_weights(
    const Tensor& grad, const Tensor& embedding, const Tensor& state, const Tensor& x,
    const Tensor& weight1, const Tensor& bias1, const Tensor& weight2, int64_t patch_size,
    int64_t stride, const std::string& precision) {
  mghf::check_precision(precision);
  PatchesOptions options = check_patches(x, weight1, weight2, patch_size, stride);
  options.bias1 = check_parameter(bias1, "bias1", options.hidden, -1);
  const PatchesGradient gradient = check_gradient(options, grad, embedding, state);
  const auto& kernels = kernels_of(options);
  const Tensor by_row = by_patch_row(weight1, patch_size);
  options.weight1 = by_row.const_data_ptr<float>();
  const mghf::ImageView view = mghf::read_view(x, "x");
  const int64_t tasks = groups(options) * options.rows, padded = kernels.padded_hidden(options);
  const int64_t size2 = kernels.layer2_size(options);

  Tensor grad_hidden =
      new_tensor(weight1, {groups(options), options.patches(), kernels.lanes, padded});
  Tensor layer2 = new_tensor(weight1, {tasks, size2});
  float* grad_hidden_data = grad_hidden.mutable_data_ptr<float>();
  float* layer2_data = layer2.mutable_data_ptr<float>();
  mghf::for_each(tasks, kernels.layer2_bytes(options), [&](int64_t task, void* workspace) {
    kernels.layer2(options, gradient, view, task, grad_hidden_data, layer2_data + task * size2,
                   workspace);
  });
  const int64_t size1 = patch_size * padded;
  Tensor layer1 = new_tensor(weight1, {kernels.parts * patch_size, size1});
  float* layer1_data = layer1.mutable_data_ptr<float>();
  mghf::for_each(kernels.parts * patch_size, kernels.layer1_bytes(options),
                 [&](int64_t task, void* workspace) {
                   kernels.layer1(options, grad_hidden_data, view, task, layer1_data + task * size1,
                                  workspace);
                 });

  // The parts and the tasks are added in order, in float64.
  const auto sum = [](const float* data, int64_t count, int64_t step) {
    double total = 0;
    for (int64_t k = 0; k < count; ++k) total += static_cast<double>(data[k * step]);
    return static_cast<float>(total);
  };
  const int64_t hidden = options.hidden, dimension = options.dimension;
  Tensor grad_weight1 = new_tensor(weight1, weight1.sizes());
  Tensor grad_bias1 = new_tensor(weight1, {hidden});
  Tensor grad_weight2 = new_tensor(weight1, {dimension, hidden});
  Tensor grad_bias2 = new_tensor(weight1, {dimension});
  float* out = grad_weight1.mutable_data_ptr<float>();
  for (int64_t unit = 0; unit < hidden; ++unit) {
    for (int64_t pixel = 0; pixel < patch_size * patch_size; ++pixel) {
      *out++ = sum(layer1_data + pixel * padded + unit, kernels.parts, patch_size * size1);
    }
  }
  out = grad_weight2.mutable_data_ptr<float>();
  for (int64_t d = 0; d < dimension; ++d) {
    for (int64_t unit = 0; unit < hidden; ++unit) {
      *out++ = sum(layer2_data + d * padded + unit, tasks, size2);
    }
  }
  out = grad_bias1.mutable_data_ptr<float>();
  for (int64_t unit = 0; unit < hidden; ++unit) {
    *out++ = sum(layer2_data + dimension * padded + unit, tasks, size2);
  }
  out = grad_bias2.mutable_data_ptr<float>();
  for (int64_t d = 0; d < dimension; ++d) {
    *out++ = sum(layer2_data + (dimension + 1) * padded + d, tasks, size2);
  }
  return {grad_weight1, grad_bias1, grad_weight2, grad_bias2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("patches", TORCH_BOX(&patches));
  m.impl("patches_backward", TORCH_BOX(&patches_backward));
  m.impl("patches_backward_add_", TORCH_BOX(&patches_backward_add_));
  m.impl("patches_backward_weights", TORCH_BOX(&patches_backward_weights));
}
