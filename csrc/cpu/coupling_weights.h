// The packed weights of the op `coupling`, and their gradients.
#pragma once

#include "coupling.h"
#include "arena.h"
#include "bfloat16_product.h"
#include "pixels.h"
#include "product.h"

namespace mghf {
namespace {

// ---- the products' operands ----

template <class Operand>
struct Operands;

template <>
struct Operands<float> {
  static constexpr int64_t kExtraRows = 0;
  static int64_t packed(int64_t depth, int64_t columns) { return packed_floats(depth, columns); }
  template <class Entry>
  static void pack_matrix(int64_t depth, int64_t columns, const Entry& entry, float* packed) {
    pack(depth, columns, entry, packed);
  }
  static void put(float* p, Vec x) { at(p) = x; }
  static Vec get(const float* p) { return at(p); }
};

#if defined(__AVX512BF16__) || defined(MGHF_AMX)
#define MGHF_BFLOAT16_PRODUCTS
template <>
struct Operands<BFloat16> {
  static constexpr int64_t kExtraRows = 32;
  static int64_t packed(int64_t depth, int64_t columns) { return packed_values(depth, columns); }
  template <class Entry>
  static void pack_matrix(int64_t depth, int64_t columns, const Entry& entry, BFloat16* packed) {
    pack(depth, columns, entry, packed, [](float x) { return mghf::to_bfloat16(x); });
  }
  static void put(BFloat16* p, Vec x) { to_bfloat16(x, p); }
  static Vec get(const BFloat16* p) {
    typedef uint16_t Half __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), IntVec)
                                 << 16);
  }
};
#endif

// ---- sizes ----

constexpr int64_t kTaps = 9;

struct Widths {
  int64_t half, hidden;                // c, 2 c
  int64_t padded_half, padded_hidden;  // in whole vectors
  int64_t taps;                        // of the mix
  int64_t inputs;                      // taps x channels of x

  explicit Widths(const CouplingOptions& s)
      : half(s.channels / 2),
        hidden(s.channels),
        padded_half(round_up(half, kLanes)),
        padded_hidden(round_up(hidden, kLanes)),
        taps(s.kernel * s.kernel),
        inputs(taps * s.inputs) {}
};

// ---- packed weights ----

// Matrices as product.h packs them, `_transposed` for the gradient. rho and eta are side by side
// where they share a product.
template <class Operand>
struct Packed {
  float *mix, *bias, *mix_transposed, *phi_depthwise, *pair_depthwise;
  Operand *phi_expand, *phi_project, *phi_expand_transposed, *phi_project_transposed;
  Operand *pair_expand, *pair_expand_transposed;
  Operand *rho_project, *rho_project_transposed, *eta_project, *eta_project_transposed;

  Packed(const Widths& w, Arena& arena) {
    const auto matrix = [&](int64_t depth, int64_t columns) {
      return arena.take<Operand>(Operands<Operand>::packed(depth, columns));
    };
    mix = arena.floats(packed_floats(w.inputs, 2 * w.padded_half));
    bias = arena.floats(2 * w.padded_half);
    mix_transposed = arena.floats(packed_floats(2 * w.padded_half, w.inputs));
    phi_expand = matrix(w.half, w.hidden);
    phi_depthwise = arena.floats(kTaps * w.padded_hidden);
    phi_project = matrix(w.hidden, w.half);
    phi_expand_transposed = matrix(w.hidden, w.half);
    phi_project_transposed = matrix(w.half, w.hidden);
    pair_expand = matrix(w.half, 2 * w.padded_hidden);
    pair_depthwise = arena.floats(kTaps * 2 * w.padded_hidden);
    pair_expand_transposed = matrix(2 * w.padded_hidden, w.half);
    rho_project = matrix(w.hidden, w.half);
    rho_project_transposed = matrix(w.half, w.hidden);
    eta_project = matrix(w.hidden, w.half);
    eta_project_transposed = matrix(w.half, w.hidden);
  }
};

// Channel of a padded pair of halves, each `padded` wide and `size` used; -1 for padding.
inline int64_t channel_of(int64_t n, int64_t padded, int64_t size) {
  const int64_t within = n % padded;
  return within < size ? n / padded * size + within : -1;
}

template <class Operand>
void pack_weights(const CouplingOptions& shape, const CouplingWeights& weights, void* packed) {
  Arena arena{static_cast<char*>(packed)};
  const Widths w(shape);
  const Packed<Operand> p(w, arena);
  // x enters the mix as taps x channels; PyTorch's kernels have the taps last.
  const auto mix = [&](int64_t input, int64_t n) {
    const int64_t output = channel_of(n, w.padded_half, w.half);
    const int64_t tap = input / shape.inputs, channel = input % shape.inputs;
    return output < 0 ? 0.0f : weights.mix[(output * shape.inputs + channel) * w.taps + tap];
  };
  const auto mix_transposed = [&](int64_t k, int64_t n) { return mix(n, k); };
  mghf::pack(w.inputs, 2 * w.padded_half, mix, p.mix);
  mghf::pack(2 * w.padded_half, w.inputs, mix_transposed, p.mix_transposed);
  for (int64_t n = 0; n < 2 * w.padded_half; ++n) {
    const int64_t output = channel_of(n, w.padded_half, w.half);
    p.bias[n] = output < 0 ? 0.0f : weights.bias[output];
  }
  const auto matrix = [](const float* data, int64_t columns) {
    return [=](int64_t row, int64_t column) { return data[row * columns + column]; };
  };
  const auto transposed = [](const float* data, int64_t columns) {
    return [=](int64_t k, int64_t n) { return data[n * columns + k]; };
  };
  const auto pack = [](int64_t depth, int64_t columns, const auto& entry, Operand* out) {
    Operands<Operand>::pack_matrix(depth, columns, entry, out);
  };
  const auto &phi = weights.phi, &rho = weights.rho, &eta = weights.eta;
  const auto project = [&](const float* data, Operand* forward, Operand* backward) {
    pack(w.hidden, w.half, transposed(data, w.hidden), forward);
    pack(w.half, w.hidden, matrix(data, w.hidden), backward);
  };
  pack(w.half, w.hidden, transposed(phi.expand, w.half), p.phi_expand);
  pack(w.hidden, w.half, matrix(phi.expand, w.half), p.phi_expand_transposed);
  project(phi.project, p.phi_project, p.phi_project_transposed);
  project(rho.project, p.rho_project, p.rho_project_transposed);
  project(eta.project, p.eta_project, p.eta_project_transposed);
  const auto pair_expand = [&](int64_t input, int64_t n) {
    const int64_t channel = n % w.padded_hidden;
    const auto& subnet = n < w.padded_hidden ? rho : eta;
    return channel < w.hidden ? subnet.expand[channel * w.half + input] : 0.0f;
  };
  const auto pair_transposed = [&](int64_t k, int64_t n) { return pair_expand(n, k); };
  pack(w.half, 2 * w.padded_hidden, pair_expand, p.pair_expand);
  pack(2 * w.padded_hidden, w.half, pair_transposed, p.pair_expand_transposed);
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    for (int64_t n = 0; n < w.padded_hidden; ++n) {
      const bool used = n < w.hidden;
      float* pair = p.pair_depthwise + tap * 2 * w.padded_hidden + n;
      p.phi_depthwise[tap * w.padded_hidden + n] = used ? phi.depthwise[n * kTaps + tap] : 0.0f;
      pair[0] = used ? rho.depthwise[n * kTaps + tap] : 0.0f;
      pair[w.padded_hidden] = used ? eta.depthwise[n * kTaps + tap] : 0.0f;
    }
  }
}

// ---- gradients of the weights ----

// Gradients of the weights, summed over one or more tiles. Matrices are [input][output]; rho and
// eta are side by side as in the packed weights.
struct Gradients {
  float *mix, *bias;
  float *phi_expand, *phi_depthwise, *phi_project;
  float *pair_expand, *pair_depthwise, *rho_project, *eta_project;

  Gradients(const Widths& w, Arena& arena) {
    mix = arena.floats(w.inputs * 2 * w.padded_half);
    bias = arena.floats(2 * w.padded_half);
    phi_expand = arena.floats(w.half * w.padded_hidden);
    phi_depthwise = arena.floats(kTaps * w.padded_hidden);
    phi_project = arena.floats(w.hidden * w.padded_half);
    pair_expand = arena.floats(w.half * 2 * w.padded_hidden);
    pair_depthwise = arena.floats(kTaps * 2 * w.padded_hidden);
    rho_project = arena.floats(w.hidden * w.padded_half);
    eta_project = arena.floats(w.hidden * w.padded_half);
  }
};

int64_t gradient_floats(const CouplingOptions& shape) {
  Arena arena{nullptr};
  const Widths w(shape);
  Gradients(w, arena);
  return static_cast<int64_t>(arena.used / sizeof(float));
}

void unpack_gradients(const CouplingOptions& shape, const float* gradients,
                      const CouplingWeightGradients& out) {
  Arena arena{reinterpret_cast<char*>(const_cast<float*>(gradients))};
  const Widths w(shape);
  const Gradients g(w, arena);
  for (int64_t n = 0; n < 2 * w.padded_half; ++n) {
    const int64_t output = channel_of(n, w.padded_half, w.half);
    if (output < 0) continue;
    out.bias[output] = g.bias[n];
    for (int64_t input = 0; input < w.inputs; ++input) {
      const int64_t tap = input / shape.inputs, channel = input % shape.inputs;
      out.mix[(output * shape.inputs + channel) * w.taps + tap] =
          g.mix[input * 2 * w.padded_half + n];
    }
  }
  const auto subnet = [&](const auto& target, const float* expand, int64_t expand_width,
                          const float* depthwise, int64_t depthwise_width, const float* project) {
    for (int64_t i = 0; i < w.half; ++i) {
      for (int64_t o = 0; o < w.hidden; ++o) {
        target.expand[o * w.half + i] = expand[i * expand_width + o];
        target.project[i * w.hidden + o] = project[o * w.padded_half + i];
      }
    }
    for (int64_t o = 0; o < w.hidden; ++o) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        target.depthwise[o * kTaps + tap] = depthwise[tap * depthwise_width + o];
      }
    }
  };
  const int64_t one = w.padded_hidden, two = 2 * w.padded_hidden;
  subnet(out.phi, g.phi_expand, one, g.phi_depthwise, one, g.phi_project);
  subnet(out.rho, g.pair_expand, two, g.pair_depthwise, two, g.rho_project);
  subnet(out.eta, g.pair_expand + one, two, g.pair_depthwise + one, two, g.eta_project);
}

}  // namespace
}  // namespace mghf
