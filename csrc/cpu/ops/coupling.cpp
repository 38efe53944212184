// The op `coupling` on the CPU: argument checks and the calls of its kernels.

#include "../coupling.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace {

using namespace mghf;

// ---- argument checks ----

// The parts of the flat tensor of weights, in the order that common/coupling.h gives.
template <class Weights, class Data>
Weights split(const CouplingShape& s, Data* data) {
  const int64_t c = s.channels / 2;
  const auto take = [&](int64_t count) {
    Data* piece = data;
    data += count;
    return piece;
  };
  Weights weights;
  weights.mix = take(s.channels * s.inputs * s.kernel * s.kernel);
  weights.bias = take(s.channels);
  for (auto* subnet : {&weights.phi, &weights.rho, &weights.eta}) {
    subnet->expand = take(2 * c * c);
    subnet->depthwise = take(2 * c * 9);
    subnet->project = take(2 * c * c);
  }
  return weights;
}

CouplingOptions check_block(const Tensor& x, const char* argument, const Tensor& weights,
                            int64_t channels, int64_t kernel, const std::string& activation,
                            double clamp, bool weight_gradients = false) {
  check_image(x, argument);
  const CouplingShape shape = check_coupling(x, channels, kernel, activation, clamp);
  check_float32(weights, "weights", 1);
  check_coupling_weights(weights, shape);
  const bool bfloat16_products = x.scalar_type() == ScalarType::BFloat16 && channels % 64 == 0 &&
                                 cpu_capability() >= CpuCapability::avx512_bf16 &&
                                 !weight_gradients;
  return {shape, x.size(2), x.size(3), bfloat16_products};
}

// ---- implementations ----

using Memory = std::vector<std::byte>;

// 64-byte aligned, within `memory`.
void* aligned(Memory& memory, size_t bytes) {
  memory.resize(bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

const void* pack(const CouplingKernels& kernels, const CouplingOptions& shape,
                 const Tensor& weights, Memory& memory) {
  void* packed = aligned(memory, kernels.packed_bytes(shape));
  kernels.pack(shape, split<CouplingWeights>(shape, weights.const_data_ptr<float>()), packed);
  return packed;
}

// How an image is cut into tiles; depends on its shape alone.
struct ImageTiles {
  int64_t batch, height, width;
  int64_t rows = (height + kCouplingTileRows - 1) / kCouplingTileRows;
  int64_t columns = (width + kCouplingTileColumns - 1) / kCouplingTileColumns;

  explicit ImageTiles(const Tensor& image)
      : batch(image.size(0)), height(image.size(2)), width(image.size(3)) {}
  int64_t count() const { return batch * rows * columns; }
  CouplingTile tile(int64_t index) const {
    const int64_t y = index / columns % rows * kCouplingTileRows;
    const int64_t x = index % columns * kCouplingTileColumns;
    return {index / columns / rows, y, std::min(y + kCouplingTileRows, height), x,
            std::min(x + kCouplingTileColumns, width)};
  }
};

Tensor coupling(const Tensor& x, const Tensor& weights, int64_t channels, int64_t kernel,
                const std::string& activation, double clamp,
                const std::string& precision) {
  check_precision(precision);
  const auto shape = check_block(x, "x", weights, channels, kernel, activation, clamp);
  const auto& kernels = MGHF_BFLOAT16_KERNELS_OF(coupling);
  Memory memory;
  const void* packed = pack(kernels, shape, weights, memory);
  Tensor y = new_image_like(x, channels);
  const ImageView from = read_view(x, "x");
  const MutableImageView to = write_view(y, "y");
  const ImageTiles tiles(x);
  for_each(tiles.count(), kernels.forward_workspace(shape), [&](int64_t i, void* workspace) {
    kernels.forward(shape, packed, tiles.tile(i), from, to, workspace);
  });
  return y;
}

Tensor coupling_inverse(const Tensor& y, const Tensor& weights, int64_t channels,
                        const std::string& activation, double clamp) {
  const auto shape = check_block(y, "y", weights, channels, 1, activation, clamp);
  STD_TORCH_CHECK(y.size(1) == channels, "y has shape ", shape_of(y), "; allowed are ", channels,
                  " channels");
  const auto& kernels = MGHF_BFLOAT16_KERNELS_OF(coupling);
  Memory memory;
  const void* packed = pack(kernels, shape, weights, memory);
  Tensor x = new_image_like(y, channels);
  const ImageView from = read_view(y, "y");
  const MutableImageView to = write_view(x, "x");
  const ImageTiles tiles(y);
  for_each(tiles.count(), kernels.forward_workspace(shape), [&](int64_t i, void* workspace) {
    kernels.inverse(shape, packed, tiles.tile(i), from, to, workspace);
  });
  return x;
}

// Partial weight gradients are summed per slot in the order of its tiles, then over the slots; both
// orders depend on the shape alone.
constexpr int64_t kSlots = 32;

std::tuple<Tensor, Tensor> coupling_backward(const Tensor& grad, const Tensor& x,
                                             const Tensor& weights, int64_t channels,
                                             int64_t kernel, const std::string& activation,
                                             double clamp, bool need_weights,
                                             const std::string& precision) {
  check_precision(precision);
  const auto shape =
      check_block(x, "x", weights, channels, kernel, activation, clamp, need_weights);
  check_image(grad, "grad");
  check_coupling_gradient(grad, x, channels);
  const auto& kernels = MGHF_BFLOAT16_KERNELS_OF(coupling);
  Memory memory;
  const void* packed = pack(kernels, shape, weights, memory);
  Tensor grad_x = new_image_like(x, x.size(1));
  Tensor grad_weights = new_tensor(weights, {need_weights ? weights.size(0) : 0});
  const ImageView upstream = read_view(grad, "grad"), from = read_view(x, "x");
  const MutableImageView to = write_view(grad_x, "grad_x");
  const ImageTiles tiles(x);
  const size_t workspace_bytes = kernels.backward_workspace(shape, need_weights);
  if (!need_weights) {
    for_each(tiles.count(), workspace_bytes, [&](int64_t i, void* workspace) {
      kernels.backward(shape, packed, tiles.tile(i), upstream, from, to, nullptr, workspace);
    });
    return {grad_x, grad_weights};
  }
  const int64_t slots = std::min(kSlots, tiles.count()), floats = kernels.gradient_floats(shape);
  Memory sums_memory;
  float* sums = static_cast<float*>(
      aligned(sums_memory, static_cast<size_t>(slots * floats) * sizeof(float)));
  for_each(slots, workspace_bytes, [&](int64_t slot, void* workspace) {
    for (int64_t i = slot; i < tiles.count(); i += slots) {
      kernels.backward(shape, packed, tiles.tile(i), upstream, from, to, sums + slot * floats,
                       workspace);
    }
  });
  for (int64_t i = 0; i < floats; ++i) {
    double total = 0;
    for (int64_t slot = 0; slot < slots; ++slot) total += sums[slot * floats + i];
    sums[i] = static_cast<float>(total);
  }
  kernels.unpack_gradients(
      shape, sums, split<CouplingWeightGradients>(shape, grad_weights.mutable_data_ptr<float>()));
  return {grad_x, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("coupling", TORCH_BOX(&coupling));
  m.impl("coupling_inverse", TORCH_BOX(&coupling_inverse));
  m.impl("coupling_backward", TORCH_BOX(&coupling_backward));
}
