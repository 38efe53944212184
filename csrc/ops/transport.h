// Arguments that `sinkhorn` and `monce` share.
#pragma once

#include <string>

#include "../cpu/sinkhorn.h"
#include "arguments.h"

namespace mghf {

inline TransportCost check_cost(const std::string& cost) {
  if (cost == "hard") return TransportCost::hard;
  if (cost == "easy") return TransportCost::easy;
  STD_TORCH_CHECK(cost == "exp", "cost is '", cost, "'; allowed are 'hard', 'easy', 'exp'");
  return TransportCost::exp;
}

// Beyond these bounds the number or its inverse is no normal float32.
inline void check_scale(double value, const char* argument) {
  STD_TORCH_CHECK(value >= 1e-30 && value <= 1e30, argument, " is ", value,
                  "; allowed is a finite number above 0 (from 1e-30 to 1e30)");
}

inline void check_iterations(int64_t iterations) {
  STD_TORCH_CHECK(iterations >= 1 && iterations <= 1'000'000, "iterations is ", iterations,
                  "; allowed is 1 to 1000000");
}

inline MatrixView matrix(const Tensor& batch, int64_t index) {
  return {batch.const_data_ptr<float>() + index * batch.stride(0), batch.stride(1),
          batch.stride(2)};
}

}  // namespace mghf
