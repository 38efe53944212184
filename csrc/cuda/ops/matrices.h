// Batches of matrices as `sinkhorn` and `monce` take them.
#pragma once

#include "../sinkhorn.h"
#include "arguments.h"

namespace mghf::cuda {

inline Element check_element(const Tensor& tensor, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::Half:
      return Element::float16;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    default:
      STD_TORCH_CHECK(false, argument, " is none of float32, float16 and bfloat16");
  }
}

// Checks a batch (B, rows, columns) and returns it for the kernels.
inline Matrices check_matrices(const Tensor& tensor, const char* argument) {
  check_cuda(tensor, argument);
  check_dimensions(tensor, argument, 3);
  STD_TORCH_CHECK(tensor.size(1) <= kMostTransported, argument, " has shape ", shape_of(tensor),
                  "; allowed are up to ", kMostTransported, " rows");
  return {tensor.const_data_ptr(), check_element(tensor, argument),
          tensor.size(0),          tensor.size(1),
          tensor.size(2),          tensor.stride(0),
          tensor.stride(1),        tensor.stride(2)};
}

}  // namespace mghf::cuda
