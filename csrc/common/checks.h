// Checks of the native ops' arguments that do not depend on the device. Each throws an error of one
// sentence, which names the argument, what came and what is allowed.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace mghf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor's shape for error messages.
inline std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

inline void check_dimensions(const Tensor& tensor, const char* argument, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, argument, " has shape ", shape_of(tensor),
                  "; allowed are ", dimensions, " dimensions");
}

inline void check_shape(const Tensor& tensor, const char* argument,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  std::string text;
  for (const int64_t size : shape) {
    same = same && tensor.size(d++) == size;
    text += (text.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(same, argument, " has shape ", shape_of(tensor), "; allowed is (", text, ")");
}

inline void check_same_shape(const Tensor& tensor, const char* argument, const Tensor& other,
                             const char* other_argument) {
  bool same = tensor.dim() == other.dim();
  for (int64_t d = 0; same && d < tensor.dim(); ++d) same = tensor.size(d) == other.size(d);
  STD_TORCH_CHECK(same, argument, " has shape ", shape_of(tensor), "; allowed is ", other_argument,
                  "'s, ", shape_of(other));
}

// The numbers from one word to the next in the state of `patches`, (N, words, maps): a contiguous
// one or some neighbouring maps of one. 0 for any other layout.
inline int64_t step_of_state(const Tensor& state) {
  const int64_t step = state.stride(1);
  const bool fits = (state.size(2) <= 1 || state.stride(2) == 1) && step >= state.size(2) &&
                    (state.size(0) <= 1 || state.stride(0) == state.size(1) * step);
  return fits ? step : 0;
}

// A tensor of an image's size, type and layout, with `channels`; contiguous unless the image is
// channels_last. `new_tensor` makes a contiguous tensor of a given shape.
template <class NewTensor>
Tensor new_image_like(const Tensor& image, int64_t channels, const NewTensor& new_tensor) {
  const int64_t b = image.size(0), c = image.size(1), h = image.size(2), w = image.size(3);
  const auto has_stride = [&](int64_t d, int64_t stride) {
    return image.size(d) == 1 || image.stride(d) == stride;
  };
  const bool channels_last = has_stride(1, 1) && has_stride(3, c) && has_stride(2, c * w) &&
                             has_stride(0, c * w * h);
  const auto made = [&](std::initializer_list<int64_t> shape) {
    return new_tensor(torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
  };
  if (!channels_last || image.is_contiguous()) return made({b, channels, h, w});
  const Tensor rows = made({b, h, w, channels});
  return torch::stable::transpose(torch::stable::transpose(rows, 1, 3), 2, 3);
}

}  // namespace mghf
