// The options of a Sinkhorn plan, for `sinkhorn` and `monce`, on the CPU and on CUDA.
#pragma once

#include <cstdint>

namespace mghf {

enum class TransportCost { hard, easy, exp };

struct TransportOptions {
  TransportCost cost;
  double epsilon;
  int64_t iterations;
  bool has_tolerance;
  float tolerance;  // largest marginal error at which the iterations stop
};

}  // namespace mghf
