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

// `kept`: the gradient from what the forward kept; `kept_rows`: likewise, by rows.
enum class Direction { forward, backward, kept, kept_rows, inverse };

// Bytes of a pixel's features: z and, in the gradient, (d1, d2) and (d_r, g1). From what the
// forward kept only (d1, d2), or d2 alone for a 1x1 mix, if not by rows.
int64_t bytes_of_pixel(const CouplingShape& s, int64_t bytes_of_element, Direction direction) {
  const int64_t half = padded_half(s) * bytes_of_element;
  if (direction == Direction::backward) return 6 * half;
  return direction == Direction::kept && s.kernel == 1 ? half : 2 * half;
}

// Rows by which the features reach beyond the result on either side, for the 3x3 layers and, in the
// gradient, a 3x3 mix.
int halo_of(const CouplingShape& s, Direction direction) {
  switch (direction) {
    case Direction::backward:
      return s.kernel == 3 ? 5 : 4;
    case Direction::kept:
    case Direction::kept_rows:
      return s.kernel == 3 ? 3 : 1;
    default:
      return 2;
  }
}

// Bytes that the features may take. The peak of a step is in the second image's forward, where both
// results, what is kept and the features are in memory: so these get three quarters of a result
// there, and in the gradient, where the results are gone, as much as one.
int64_t most_feature_bytes(const CouplingShape& s, int64_t pixels, int64_t bytes_of_element,
                           Direction direction) {
  if (coupling_feature_bytes > 0) return coupling_feature_bytes;
  constexpr int64_t kUsual = int64_t{160} << 20, kForward = int64_t{96} << 20;
  const int64_t result = pixels * s.channels * bytes_of_element;
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  if (direction == Direction::forward) return larger(kForward, result / 4 * 3);
  const bool kept = direction == Direction::kept || direction == Direction::kept_rows;
  return kept ? larger(kUsual, result) : kUsual;
}

// The parts that are computed at a time: some images, or some rows of one.
struct Parts {
  int64_t images, rows, kept_rows;

  Parts(const CouplingShape& s, int64_t batch, int64_t height, int64_t width,
        int64_t bytes_of_element, Direction direction) {
    constexpr int64_t kLeast = 8;  // of rows: a tile
    const int64_t of_row = bytes_of_pixel(s, bytes_of_element, direction) * width;
    const int64_t most =
        most_feature_bytes(s, batch * height * width, bytes_of_element, direction);
    const int64_t fitting = of_row > 0 ? most / of_row : batch * height;
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
  Packed mix, mix_transposed;
  const unsigned char *mix_rows, *mix_rows_transposed;  // for the kernels of rows, or null
  bool rows_once;  // whether products by rows are one each, of the big parts
  const float* bias;
  SubnetWeights phi, rho, eta;
};

// Lays the packed weights out in memory: for the value and the gradient together, or for the
// inverse. The layout does not depend on the precision. With less than float32 the exact matrices'
// products are one of TF32 or, by rows, of halves each, and for bfloat16 the fast ones' one of
// bfloat16.
template <class T>
PackedWeights lay_out(const CouplingShape& s, const float* weights, bool inverse, Pieces& pieces,
                      Packing& packing, Precision precision = Precision::float32) {
  const int64_t c = s.channels / 2, half = padded_half(s), terms = terms_of(s);
  packing.count = packing.rows.count = packing.rows.mix_count = 0;
  const auto add = [&](const float* from, const Axis& n, const Axis& k, bool fast) {
    const Matrix matrix{from, n, k, nullptr, fast};
    const int loads =
        fast ? Fast<T>::kSteps * Fast<T>::kLoads : Exact<T>::kSteps * Exact<T>::kLoads;
    uint4* const to = pieces.take<uint4>(matrix.blocks() * loads * kWarp);
    packing.matrices[packing.count] = matrix;
    packing.matrices[packing.count++].to = to;
    return Packed{to, precision == Precision::bfloat16 ||
                          (precision == Precision::tf32 && !fast)};
  };
  const auto take = [&](int64_t count) {
    const float* const piece = weights;
    weights += count;
    return piece;
  };
  PackedWeights packed{};
  packed.rows_once = precision != Precision::float32;
  const float* const mix = take(s.channels * terms);
  const Axis all_terms{1, terms, padded_to(terms, kGroup), 1}, features{2, c, half, terms};
  // The inverse of the mix takes features and gives an image; the mix does the opposite.
  const Axis all_channels{1, s.channels, padded_to(s.channels, kGroup), terms};
  if (inverse) {
    packed.mix = add(mix, all_channels, {2, c, half, 1}, false);
  } else {
    packed.mix = add(mix, features, all_terms, false);
    const int64_t chunks = (s.inputs + kUnmixChannels - 1) / kUnmixChannels;
    const Axis taps{chunks, kUnmixChannels * kTaps, kUnmixColumns, 1, terms};
    packed.mix_transposed = add(mix, s.kernel == 1 ? all_terms : taps, features, true);
  }
  const auto add_rows_of_mix = [&](const Axis& n, const Axis& k) {
    const Matrix matrix{mix, n, k, nullptr, false};
    const int64_t bytes = kPartsOf<T> * n.pieces * n.padded * k.pieces * k.padded * 2 + kScaleBytes;
    unsigned char* const to = pieces.take<unsigned char>(bytes);
    packing.rows.mixes[packing.rows.mix_count++] = {matrix, kPartsOf<T>, to};
    return to;
  };
  if (const int64_t depths = inverse ? 0 : mix_depths(terms, s.kernel, half); depths > 0) {
    packed.mix_rows = add_rows_of_mix(features, {1, terms, depths * kGroup, 1});
  }
  if (!inverse && half <= kWidestRows && s.kernel == 1 && terms <= s.channels) {
    packed.mix_rows_transposed = add_rows_of_mix({1, terms, 2 * half, 1}, features);
  }
  packing.bias = take(s.channels);
  packing.bias_axis = inverse ? Axis{1, s.channels, padded_to(s.channels, kGroup), 1}
                              : Axis{2, c, half, 1};
  packing.padded_bias = pieces.take<float>(2 * half);
  packed.bias = packing.padded_bias;
  for (SubnetWeights* subnet : {&packed.phi, &packed.rho, &packed.eta}) {
    const float* const expand = take(2 * c * c);
    subnet->depthwise = take(2 * c * 9);
    const float* const project = take(2 * c * c);
    subnet->expand = add(expand, {1, 2 * c, 2 * half, c}, {1, c, half, 1}, false);
    subnet->project = add(project, {1, c, half, 2 * c}, {1, 2 * c, 2 * half, 1}, false);
    if (inverse) continue;
    subnet->expand_transposed = add(expand, {1, c, half, 1}, {1, 2 * c, 2 * half, c}, true);
    subnet->project_transposed = add(project, {1, 2 * c, 2 * half, 1}, {1, c, half, 2 * c}, true);
    if (half > kWidestRows) continue;
    const Matrix* const of = packing.matrices + packing.count - 4;
    const auto add_rows = [&](const Matrix& first, const Matrix& second, int tap_rows) {
      const RowsLayout layout{static_cast<int>(half), kPartsOf<T>, tap_rows};
      unsigned char* const to = pieces.take<unsigned char>(layout.bytes());
      packing.rows.subnets[packing.rows.count++] = {first, second, subnet->depthwise,
                                                    static_cast<int>(2 * c), layout, to};
      return to;
    };
    subnet->rows = add_rows(of[0], of[1], 3);
    subnet->rows_gradient = add_rows(of[3], of[2], kGradientTapRows);
  }
  return packed;
}

// Packs the weights into memory that `packed_bytes` says the size of; returns an error text, or
// null.
template <class T>
const char* pack(const CouplingShape& s, const float* weights, bool inverse, void* memory,
                 Stream stream) {
  Pieces pieces(memory);
  Packing packing{};
  lay_out<T>(s, weights, inverse, pieces, packing);
  const Grid grid{packing.blocks() + packing.rows.blocks(), kPackThreads};
  return launch(pack_weights<T>, grid, stream, packing);
}

template <class T>
int64_t packed_bytes(const CouplingShape& s, bool inverse) {
  Pieces pieces;
  Packing packing{};
  lay_out<T>(s, nullptr, inverse, pieces, packing);
  return pieces.bytes();
}

}  // namespace

}  // namespace mghf::cuda
