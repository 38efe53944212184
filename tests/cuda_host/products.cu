#include "products.h"

#include "../../csrc/cuda/wgmma.h"

namespace mghf::cuda {

namespace {

constexpr int kStep = 16;  // depths of a product
constexpr int kSlot = kProductColumns * kStep;
constexpr int kAlongColumns = 128, kAlongDepth = kProductColumns / 8 * kAlongColumns;

// b goes through a ring of two slots, one for the product that is under way.
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* result, int depth, int fault) {
  MGHF_DYNAMIC_SHARED(uint16_t, ring);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int row = thread / kWarp * 16 + lane / 4, t = lane % 4;
  float d[kProductColumns / 2] = {};
  uint32_t of_a[2][4];
  for (int k = 0; k < depth; k += kStep) {
    const int slot = fault == 3 ? 0 : k / kStep % 2;
    for (int i = thread; i < kSlot; i += kWarpgroup) {
      const int n = i / kStep, of = i % kStep;
      const int at = of / 8 * (kAlongDepth / 2) + n / 8 * (kAlongColumns / 2) + n % 8 * 8 + of % 8;
      ring[slot * kSlot + at] = b[(k + of) * kProductColumns + n];
    }
    if (fault != 7) publish_shared();
    uint32_t(&words)[4] = of_a[fault == 5 ? 0 : k / kStep % 2];
    for (int i = 0; i < 4; ++i) {
      const uint16_t* const from = a + (row + i % 2 * 8) * depth + k + 2 * t + i / 2 * 8;
      words[i] = from[0] | static_cast<uint32_t>(from[1]) << 16;
    }
    if (fault != 1) begin_products();
    const int distance = fault == 2 ? kAlongDepth / 2 : kAlongDepth;
    multiply_add_later<kProductColumns>(
        d, words, SharedColumns(ring + slot * kSlot, distance, kAlongColumns));
    end_products();
    wait_for_products<1>();
    if (fault != 6) __syncthreads();
  }
  if (fault != 4) wait_for_products<0>();
  for (int j = 0; j < kProductColumns / 8; ++j) {
    for (int i = 0; i < 4; ++i) {
      result[(row + i / 2 * 8) * kProductColumns + j * 8 + 2 * t + i % 2] = d[4 * j + i];
    }
  }
  wait_for_products<0>();
}

}  // namespace

const char* planted_product(const uint16_t* a, const uint16_t* b, float* result, int depth,
                            int fault, Stream stream) {
  return launch(multiply, {1, kWarpgroup, 2 * kSlot * sizeof(uint16_t)}, stream, a, b, result,
                depth, fault);
}

}  // namespace mghf::cuda
