// The precision of the products in an op's matrix products, its option `precision`.
#pragma once

namespace mghf {

// The least precision that is asked for: kernels may be more precise.
enum class Precision { float32, tf32, bfloat16 };

}  // namespace mghf
