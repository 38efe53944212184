// A tensor's shape for error messages.
#pragma once

#include <string>

#include <torch/csrc/stable/tensor.h>

namespace mghf {

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::string text = "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    text += (d > 0 ? ", " : "") + std::to_string(tensor.size(d));
  }
  return text + ")";
}

}  // namespace mghf
