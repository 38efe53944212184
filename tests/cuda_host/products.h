// A matrix product by warpgroups, with or without a fault, for testing what csrc/cuda/wgmma.h and the
// emulator make of it.
#pragma once

#include "../../csrc/cuda/device.h"

namespace mghf::cuda {

constexpr int kProductRows = 64, kProductColumns = 32;

// result (64 x 32) = a (64 x depth) b (depth x 32), of halves; the depth is a multiple of 16. Faults:
//     1  without begin_products()
//     2  a wrong distance between the cores of b
//     3  the slot of b is written again while a product reads it
//     4  the sums are read before the wait
//     5  the registers of a are written again while a product reads them
//     6  without the barrier between the wait and the next write to b, a race
//     7  without the barrier between the writes to b and the product, a race
const char* planted_product(const uint16_t* a, const uint16_t* b, float* result, int depth,
                            int fault, Stream stream);

}  // namespace mghf::cuda
