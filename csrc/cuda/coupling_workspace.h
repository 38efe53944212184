// The memory of a call of `coupling`: how many images or rows at a time, and packed weights.
#pragma once

#include "coupling_mix.h"
#include "coupling_stages.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

int64_t padded_to(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}
int64_t padded_half(const CouplingShape& s) {
  const int64_t c = s.channels / 2;
  return c <= 32 ? 32 : c <= 64 ? 64 : 128;
}
int64_t terms_of(const CouplingShape& s) { return s.inputs * s.kernel * s.kernel; }

enum class Direction { forward, backward, inverse };

// Bytes of a pixel's features: z and, in the gradient, (d1, d2) and (d_r, g1), whose memory the
// products of a 3x3 mix then use.
int64_t bytes_of_pixel(const CouplingShape& s, int64_t bytes_of_element, Direction direction) {
  const int64_t features = 2 * padded_half(s) * bytes_of_element;
  if (direction != Direction::backward) return features;
  const int64_t products =
      s.kernel == 3 ? terms_of(s) * static_cast<int64_t>(sizeof(float)) : int64_t{0};
  return 2 * features + (products > features ? products : features);
}

// Rows by which the features reach beyond the result on either side, for the 3x3 layers and, in the
// gradient, a 3x3 mix.
int halo_of(const CouplingShape& s, Direction direction) {
  return direction == Direction::backward ? (s.kernel == 3 ? 5 : 4) : 2;
}

// The parts that are computed at a time: some images, or some rows of one.
struct Parts {
  int64_t images, rows, kept_rows;

  Parts(const CouplingShape& s, int64_t batch, int64_t height, int64_t width,
        int64_t bytes_of_element, Direction direction) {
    constexpr int64_t kLeast = 8;  // of rows: a tile
    const int64_t of_row = bytes_of_pixel(s, bytes_of_element, direction) * width;
    const int64_t fitting = of_row > 0 ? coupling_feature_bytes / of_row : batch * height;
    const int64_t some = height > 0 ? fitting / height : batch;
    images = some < 1 ? 1 : some < batch ? some : batch;
    rows = kept_rows = height;
    if (some >= 1) return;
    const int64_t halo = 2 * halo_of(s, direction), least = (fitting - halo) / kLeast * kLeast;
    rows = least < kLeast ? kLeast : least;
    rows = rows < height ? rows : height;
    kept_rows = rows + halo < height ? rows + halo : height;
  }
};

struct PackedWeights {
  const uint4 *mix, *mix_transposed;
  const float* bias;
  SubnetWeights phi, rho, eta;
};

// Lays the packed weights out in the workspace.
template <class T>
PackedWeights lay_out(const CouplingShape& s, const float* weights, Direction direction,
                      Pieces& pieces, Packing& packing) {
  const bool backward = direction == Direction::backward;
  const int64_t c = s.channels / 2, half = padded_half(s), terms = terms_of(s);
  packing.count = 0;
  const auto add = [&](const float* from, const Axis& n, const Axis& k, bool fast) {
    const Matrix matrix{from, n, k, nullptr, fast};
    const int loads =
        fast ? Fast<T>::kSteps * Fast<T>::kLoads : Exact<T>::kSteps * Exact<T>::kLoads;
    uint4* const to = pieces.take<uint4>(matrix.blocks() * loads * kWarp);
    packing.matrices[packing.count] = matrix;
    packing.matrices[packing.count++].to = to;
    return to;
  };
  const auto take = [&](int64_t count) {
    const float* const piece = weights;
    weights += count;
    return piece;
  };
  PackedWeights packed{};
  const float* const mix = take(s.channels * terms);
  const Axis all_terms{1, terms, padded_to(terms, kGroup), 1};
  // The inverse of the mix takes features and gives an image; the mix does the opposite.
  const Axis all_channels{1, s.channels, padded_to(s.channels, kGroup), terms};
  packed.mix = direction == Direction::inverse ? add(mix, all_channels, {2, c, half, 1}, false)
                                               : add(mix, {2, c, half, terms}, all_terms, false);
  if (backward) packed.mix_transposed = add(mix, all_terms, {2, c, half, terms}, true);
  packing.bias = take(s.channels);
  packing.bias_axis = direction == Direction::inverse
                          ? Axis{1, s.channels, padded_to(s.channels, kGroup), 1}
                          : Axis{2, c, half, 1};
  packing.padded_bias = pieces.take<float>(2 * half);
  packed.bias = packing.padded_bias;
  for (SubnetWeights* subnet : {&packed.phi, &packed.rho, &packed.eta}) {
    const float* const expand = take(2 * c * c);
    subnet->depthwise = take(2 * c * 9);
    const float* const project = take(2 * c * c);
    subnet->expand = add(expand, {1, 2 * c, 2 * half, c}, {1, c, half, 1}, false);
    // The gradient does not compute y.
    if (!(backward && subnet == &packed.eta)) {
      subnet->project = add(project, {1, c, half, 2 * c}, {1, 2 * c, 2 * half, 1}, false);
    }
    if (backward) {
      subnet->expand_transposed = add(expand, {1, c, half, 1}, {1, 2 * c, 2 * half, c}, true);
      subnet->project_transposed = add(project, {1, 2 * c, 2 * half, 1}, {1, c, half, 2 * c}, true);
    }
  }
  return packed;
}

}  // namespace

}  // namespace mghf::cuda
