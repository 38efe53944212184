// The invertible block, its inverse and its gradients, on the CPU. For the mathematics see
// mghf_fast/reference/coupling.py.
//
// Method. A task writes one tile, 64 columns by 128 rows, and streams down its rows. Every stage
// (mix, phi's hidden layer, the new z2, the hidden layers of rho and eta, ...) keeps only the rows
// that later stages still need, in rings of 1 to 5 rows [pixel][channel] that stay in the L2 cache;
// nothing but the block's input and output is in memory. At a tile's edge a stage computes the
// columns that the next one's 3 x 3 kernel reaches, which costs 3 to 10 % more arithmetic.
//
// The 1 x 1 convolutions are products of a row of pixels with a packed matrix; rho and eta share
// their input, so their first layers are one product. Activations are applied while a product's
// block is in registers, and the slopes for the gradient are read off the activations' values.
// The gradient recomputes the forward in the same stream, four rows ahead.
//
// bfloat16 images on CPUs with instructions for it: the products' operands are rounded to bfloat16,
// the sums and everything between two products stay float32. The mix, often of few channels, stays
// float32 altogether, and so do weight gradients.
//
// Floor at C = 128: 16,384 + 3 x 17,536 multiply-adds a pixel forward, about 2 x that backward;
// memory traffic, 1 KiB a pixel forward, is far below.

#include "coupling.h"

#include "arena.h"
#include "bfloat16_product.h"
#include "pixels.h"
#include "product.h"

#ifndef MGHF_KERNELS
#define MGHF_KERNELS coupling_default
#endif

namespace mghf {
namespace {

constexpr int64_t kTaps = 9;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Reflection by one pixel; a side of length one is repeated.
inline int64_t reflect(int64_t i, int64_t n) {
  if (n == 1) return 0;
  return i < 0 ? -i : i >= n ? 2 * (n - 1) - i : i;
}

// ---- pointwise functions; a NaN stays one ----

inline Vec expm(Vec x) {
  // Beyond these bounds the result is 0 or infinite; the comparisons let a NaN through.
  x = splat(-150.0f) > x ? splat(-150.0f) : x;
  x = splat(150.0f) < x ? splat(150.0f) : x;
  return exponential(x);
}

// log(1 + u), 0 <= u <= 1, as 2 artanh(u / (2 + u)).
inline Vec log_one_plus(Vec u) {
  const Vec s = u / (u + 2.0f), q = s * s;
  Vec p = splat(1.0f / 15);
  p = p * q + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  return 2.0f * s * (p * q + 1.0f);
}

inline Vec tanh(Vec x) {
  const Vec q = x * x;
  Vec p = splat(62.0f / 2835);
  p = p * q - 17.0f / 315;
  p = p * q + 2.0f / 15;
  p = p * q - 1.0f / 3;
  const Vec small = x + x * q * p;
  const Vec large = 1.0f - 2.0f / (expm(2.0f * x) + 1.0f);
  return abs(x) < 0.25f ? small : large;
}

template <Activation kind>
inline Vec activate(Vec x) {
  if constexpr (kind == Activation::relu6) {
    x = splat(0.0f) > x ? splat(0.0f) : x;
    return splat(6.0f) < x ? splat(6.0f) : x;
  } else if constexpr (kind == Activation::softplus) {
    return (x > 0.0f ? x : x * 0.0f) + log_one_plus(expm(-abs(x)));
  } else {
    return x > 0.0f ? x : 0.01f * x;
  }
}

// The activation's derivative times g, from the activation's value.
template <Activation kind>
inline Vec through(Vec value, Vec g) {
  if constexpr (kind == Activation::relu6) {
    return (value > 0.0f) & (value < 6.0f) ? g : splat(0.0f);
  } else if constexpr (kind == Activation::softplus) {
    const Vec small = value * (1.0f - value * (0.5f - value * (1.0f / 6)));
    return g * (value < 0.01f ? small : 1.0f - expm(-value));
  } else {
    return value > 0.0f ? g : 0.01f * g;
  }
}

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

// ---- sizes and packed weights ----

struct Widths {
  int64_t half, hidden;                // c, 2 c
  int64_t padded_half, padded_hidden;  // in whole vectors
  int64_t taps;                        // of the mix
  int64_t inputs;                      // taps x channels of x

  explicit Widths(const CouplingShape& s)
      : half(s.channels / 2),
        hidden(s.channels),
        padded_half(round_up(half, kLanes)),
        padded_hidden(round_up(hidden, kLanes)),
        taps(s.kernel * s.kernel),
        inputs(taps * s.inputs) {}
};

// Matrices as product.h packs them; `_transposed` for the way of the gradient. rho and eta side by
// side where they share a product.
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
void pack_weights(const CouplingShape& shape, const CouplingWeights& weights, void* packed) {
  Arena arena{static_cast<char*>(packed)};
  const Widths w(shape);
  const Packed<Operand> p(w, arena);
  // x enters the mix as taps x channels; PyTorch's kernels have the taps last.
  const auto mix = [&](int64_t input, int64_t n) {
    const int64_t output = channel_of(n, w.padded_half, w.half);
    const int64_t tap = input / shape.inputs, channel = input % shape.inputs;
    return output < 0 ? 0.0f : weights.mix[(output * shape.inputs + channel) * w.taps + tap];
  };
  pack(w.inputs, 2 * w.padded_half, mix, p.mix);
  pack(
      2 * w.padded_half, w.inputs, [&](int64_t k, int64_t n) { return mix(n, k); },
      p.mix_transposed);
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
  const auto &phi = weights.phi, &rho = weights.rho, &eta = weights.eta;
  Operands<Operand>::pack_matrix(w.half, w.hidden, transposed(phi.expand, w.half), p.phi_expand);
  Operands<Operand>::pack_matrix(w.hidden, w.half, matrix(phi.expand, w.half),
                                 p.phi_expand_transposed);
  Operands<Operand>::pack_matrix(w.hidden, w.half, transposed(phi.project, w.hidden),
                                 p.phi_project);
  Operands<Operand>::pack_matrix(w.half, w.hidden, matrix(phi.project, w.hidden),
                                 p.phi_project_transposed);
  Operands<Operand>::pack_matrix(w.hidden, w.half, transposed(rho.project, w.hidden),
                                 p.rho_project);
  Operands<Operand>::pack_matrix(w.half, w.hidden, matrix(rho.project, w.hidden),
                                 p.rho_project_transposed);
  Operands<Operand>::pack_matrix(w.hidden, w.half, transposed(eta.project, w.hidden),
                                 p.eta_project);
  Operands<Operand>::pack_matrix(w.half, w.hidden, matrix(eta.project, w.hidden),
                                 p.eta_project_transposed);
  const auto pair_expand = [&](int64_t input, int64_t n) {
    const int64_t channel = n % w.padded_hidden;
    const auto& subnet = n < w.padded_hidden ? rho : eta;
    return channel < w.hidden ? subnet.expand[channel * w.half + input] : 0.0f;
  };
  Operands<Operand>::pack_matrix(w.half, 2 * w.padded_hidden, pair_expand, p.pair_expand);
  Operands<Operand>::pack_matrix(
      2 * w.padded_hidden, w.half, [&](int64_t k, int64_t n) { return pair_expand(n, k); },
      p.pair_expand_transposed);
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

// ---- rows ----

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The last `ring` rows of one stage, [pixel][channel]. There is a pixel more on either side than
// the stage computes, for reflections.
template <class T>
struct BasicRows {
  T* data;
  int64_t ring, columns, width, first;

  BasicRows(int64_t ring, int64_t columns, int64_t width, Arena& arena)
      : data(arena.take<T>((ring * (columns + 2) + Operands<T>::kExtraRows) * width)),
        ring(ring),
        columns(columns + 2),
        width(width),
        first(0) {}
  T* row(int64_t y, int64_t x) const { return data + (y % ring * columns + x - first) * width; }
};
using Rows = BasicRows<float>;

// The same as [channel vector][pixel][lane], for the depthwise convolutions: they go along the row
// with one vector of channels and so read memory in order. Channel c (the first of a vector) of a
// pixel is at row(y, x)[c * columns].
struct BlockedRows : Rows {
  using Rows::Rows;
  float* row(int64_t y, int64_t x) const {
    return data + y % ring * columns * width + (x - first) * kLanes;
  }
};

// The depthwise convolution of one row, of the channels from `begin` to `end`: store(pixel, c,
// value). `rows` point at the pixel left of the first in the rows above, of and below.
template <class Store>
inline void depthwise(const BlockedRows& layout, const float* const (&rows)[3],
                      const float* weights, int64_t begin, int64_t end, int64_t pixels,
                      const Store& store) {
  for (int64_t c = begin; c < end; c += kLanes) {
    Vec w[kTaps];
    for (int64_t tap = 0; tap < kTaps; ++tap) w[tap] = at(weights + tap * layout.width + c);
    const float* const top = rows[0] + c * layout.columns;
    const float* const middle = rows[1] + c * layout.columns;
    const float* const bottom = rows[2] + c * layout.columns;
    for (int64_t p = 0; p < pixels; ++p) {
      Vec totals[3] = {};
      for (int64_t kx = 0; kx < 3; ++kx) {
        const int64_t i = (p + kx) * kLanes;
        totals[0] += w[kx] * at(top + i);
        totals[1] += w[3 + kx] * at(middle + i);
        totals[2] += w[6 + kx] * at(bottom + i);
      }
      store(p, c, totals[0] + totals[1] + totals[2]);
    }
  }
}

// Writes the reflected pixels beside the image's borders.
inline void pad_row(const BlockedRows& rows, int64_t y, Range x, int64_t width) {
  const auto copy = [&](int64_t to, int64_t from) {
    for (int64_t c = 0; c < rows.width; c += kLanes) {
      at(rows.row(y, to) + c * rows.columns) = at(rows.row(y, from) + c * rows.columns);
    }
  };
  if (x.begin == 0) copy(-1, reflect(-1, width));
  if (x.end == width) copy(width, reflect(width, width));
}

// ---- the stream of a tile ----

template <Activation kind, class Operand>
struct Stream {
  using Ops = Operands<Operand>;
  const CouplingShape& shape;
  const Widths w;
  const Packed<Operand> p;
  const CouplingTile& tile;
  const int64_t halo;  // by how many pixels z1 and phi's hidden layer reach beyond the tile

  // All rows have room for the widest halo; for the rings see the users.
  Rows input, z;
  BlockedRows hidden1;
  BasicRows<Operand> depthwise1;
  BlockedRows hidden2;
  Operand* rounded;  // one row of a half, for `operand`
  int64_t next_z2 = 0, next_hidden1 = 0, next_hidden2 = 0, next_input = 0;
  ImageView x;

  Stream(const CouplingShape& shape, const void* packed, const CouplingTile& tile, int64_t halo,
         int64_t ring1, int64_t ring2, int64_t ring_depthwise, Arena& arena)
      : shape(shape),
        w(shape),
        p([&] {
          Arena pieces{static_cast<char*>(const_cast<void*>(packed))};
          return Packed<Operand>(w, pieces);
        }()),
        tile(tile),
        halo(halo),
        input(shape.kernel, kCouplingTileColumns + 2 * halo, shape.inputs, arena),
        z(ring1, kCouplingTileColumns + 2 * halo, 2 * w.padded_half, arena),
        hidden1(ring1, kCouplingTileColumns + 2 * halo, w.padded_hidden, arena),
        depthwise1(ring_depthwise, kCouplingTileColumns + 2 * halo, w.padded_hidden, arena),
        hidden2(ring2, kCouplingTileColumns + 2 * halo, 2 * w.padded_hidden, arena),
        rounded(arena.take<Operand>((kCouplingTileColumns + 2 * halo + Ops::kExtraRows) *
                                    w.padded_half)) {
    place(input, z, hidden1, depthwise1, hidden2);
  }

  template <class... AnyRows>
  void place(AnyRows&... rows) const {
    ((rows.first = tile.x_begin - halo - 1), ...);
  }

  // A row of one half of the channels as an operand: as it is, or rounded.
  struct OperandRow {
    const Operand* data;
    int64_t width;
  };
  OperandRow operand(const float* row, int64_t width, int64_t pixels) const {
    if constexpr (sizeof(Operand) == sizeof(float)) {
      return {row, width};
    } else {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t c = 0; c < w.padded_half; c += kLanes) {
          Ops::put(rounded + pixel * w.padded_half + c, at(row + pixel * width + c));
        }
      }
      return {rounded, w.padded_half};
    }
  }

  Range columns(int64_t reach) const {
    return {larger(tile.x_begin - reach, 0), smaller(tile.x_end + reach, shape.width)};
  }
  Range rows(int64_t reach) const {
    return {larger(tile.y_begin - reach, 0), smaller(tile.y_end + reach, shape.height)};
  }
  int64_t last_row() const { return shape.height - 1; }

  void start(ImageView image) {
    x = image;
    next_hidden1 = rows(halo).begin;
    next_z2 = next_hidden2 = rows(halo - 1).begin;
    next_input = rows(halo + shape.kernel / 2).begin;
  }

  // The three rows around y that a 3 x 3 kernel sees, at the pixel left of x.
  void around(const BlockedRows& rows, int64_t y, int64_t x, const float* (&result)[3]) const {
    for (int64_t i = 0; i < 3; ++i) {
      result[i] = rows.row(reflect(y - 1 + i, shape.height), x - 1);
    }
  }

  // The mix: z of row y.
  void mix_row(int64_t y) {
    const Range at_x = columns(halo);
    const int64_t radius = shape.kernel / 2;
    for (; next_input <= smaller(y + radius, last_row()); ++next_input) {
      const Range wide = columns(halo + radius);
      float* row = input.row(next_input, wide.begin);
      read_pixels(x, tile.batch, next_input, wide.begin, wide.size(), 0, shape.inputs, row,
                  shape.inputs);
      // The kernel of 3 has zero padding.
      if (radius > 0 && wide.begin == 0) clear(input.row(next_input, -1), shape.inputs);
      if (radius > 0 && wide.end == shape.width) {
        clear(input.row(next_input, shape.width), shape.inputs);
      }
    }
    float* out = z.row(y, at_x.begin);
    const auto store = [&](int64_t pixel, int64_t v, Vec value) {
      at(out + pixel * z.width + v * kLanes) = value + at(p.bias + v * kLanes);
    };
    const int64_t vectors = z.width / kLanes;
    if (radius == 0) {
      multiply(at_x.size(), vectors, input.row(y, at_x.begin), shape.inputs, shape.inputs, p.mix,
               store);
      return;
    }
    const float* runs[3];
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t source = y - 1 + i;
      const bool outside = source < 0 || source > last_row();
      runs[i] = outside ? nullptr : input.row(source, at_x.begin - 1);
    }
    multiply(at_x.size(), vectors, runs, shape.inputs, 3 * shape.inputs, p.mix, store);
  }

  static void clear(float* data, int64_t count) {
    for (int64_t i = 0; i < count; ++i) data[i] = 0;
  }

  // phi's hidden layer of row y, from z1.
  void hidden1_row(int64_t y, Range at_x) {
    float* out = hidden1.row(y, at_x.begin);
    const auto z1 = operand(z.row(y, at_x.begin), z.width, at_x.size());
    multiply(at_x.size(), hidden1.width / kLanes, z1.data, z1.width, w.half, p.phi_expand,
             [&](int64_t pixel, int64_t v, Vec value) {
               at(out + (v * hidden1.columns + pixel) * kLanes) = activate<kind>(value);
             });
    pad_row(hidden1, y, at_x, shape.width);
  }

  // rho's and eta's hidden layers of row y, from z2.
  void hidden2_row(int64_t y, Range at_x) {
    float* out = hidden2.row(y, at_x.begin);
    const auto z2 = operand(z.row(y, at_x.begin) + w.padded_half, z.width, at_x.size());
    multiply(at_x.size(), hidden2.width / kLanes, z2.data, z2.width, w.half, p.pair_expand,
             [&](int64_t pixel, int64_t v, Vec value) {
               at(out + (v * hidden2.columns + pixel) * kLanes) = activate<kind>(value);
             });
    pad_row(hidden2, y, at_x, shape.width);
  }

  // The depthwise layer of phi at row y, into depthwise1.
  void depthwise1_row(int64_t y, Range at_x) {
    const float* sources[3];
    around(hidden1, y, at_x.begin, sources);
    Operand* out = depthwise1.row(y, at_x.begin);
    depthwise(hidden1, sources, p.phi_depthwise, 0, hidden1.width, at_x.size(),
              [&](int64_t pixel, int64_t c, Vec value) {
                Ops::put(out + pixel * hidden1.width + c, activate<kind>(value));
              });
  }

  // The depthwise layer of rho (subnet 0) or eta (1) at row y, [pixel][channel].
  void depthwise2_row(int64_t y, Range at_x, int64_t subnet, Operand* out) {
    const float* sources[3];
    around(hidden2, y, at_x.begin, sources);
    const int64_t begin = subnet * w.padded_hidden;
    depthwise(hidden2, sources, p.pair_depthwise, begin, begin + w.padded_hidden, at_x.size(),
              [&](int64_t pixel, int64_t c, Vec value) {
                Ops::put(out + pixel * w.padded_hidden + c - begin, activate<kind>(value));
              });
  }

  // z2 (+ or -)= phi(z1) at row y.
  void add_phi_row(int64_t y, Range at_x, float sign) {
    depthwise1_row(y, at_x);
    float* z2 = z.row(y, at_x.begin) + w.padded_half;
    multiply(at_x.size(), w.padded_half / kLanes, depthwise1.row(y, at_x.begin), hidden1.width,
             w.hidden, p.phi_project, [&](int64_t pixel, int64_t v, Vec value) {
               at(z2 + pixel * z.width + v * kLanes) += sign * value;
             });
  }

  // Streams on until the hidden layers of rho and eta reach row y: the first half of the forward.
  void need_hidden2(int64_t y) {
    for (; next_hidden2 <= smaller(y, last_row()); ++next_hidden2) {
      for (; next_hidden1 <= smaller(next_hidden2 + 1, last_row()); ++next_hidden1) {
        mix_row(next_hidden1);
        hidden1_row(next_hidden1, columns(halo));
      }
      add_phi_row(next_hidden2, columns(halo - 1), 1.0f);
      hidden2_row(next_hidden2, columns(halo - 1));
    }
  }

  // The log of the scale, from what rho gives.
  Vec log_scale(Vec raw) const {
    return shape.clamp > 0 ? shape.clamp * tanh(raw / shape.clamp) : raw;
  }
};

// ---- forward ----

template <Activation kind, class Operand>
struct Forward : Stream<kind, Operand> {
  using Base = Stream<kind, Operand>;
  BasicRows<Operand> depthwise2;
  Rows out;

  Forward(const CouplingShape& shape, const void* packed, const CouplingTile& tile, Arena& arena)
      : Base(shape, packed, tile, 2, 3, 3, 1, arena),
        depthwise2(1, kCouplingTileColumns, this->w.padded_hidden, arena),
        out(1, kCouplingTileColumns, 2 * this->w.padded_half, arena) {}

  void write_row(MutableImageView y, int64_t row, Range at_x, int64_t half, const float* from) {
    write_pixels(y, this->tile.batch, row, at_x.begin, at_x.size(), half * this->w.half,
                 this->w.half, from + half * this->w.padded_half, out.width);
  }

  void run(ImageView x, MutableImageView y) {
    const Widths& w = this->w;
    const Range at_x = this->columns(0);
    this->start(x);
    for (int64_t row = this->tile.y_begin; row < this->tile.y_end; ++row) {
      this->need_hidden2(row + 1);
      Operand* values = depthwise2.data;
      float* result = out.data;
      const float* z1 = this->z.row(row, at_x.begin);
      const int64_t width = out.width;
      this->depthwise2_row(row, at_x, 0, values);
      multiply(at_x.size(), w.padded_half / kLanes, values, depthwise2.width, w.hidden,
               this->p.rho_project, [=, this](int64_t pixel, int64_t v, Vec value) {
                 const int64_t i = pixel * width + v * kLanes;
                 at(result + i) = at(z1 + i) * expm(this->log_scale(value));
               });
      this->depthwise2_row(row, at_x, 1, values);
      multiply(at_x.size(), w.padded_half / kLanes, values, depthwise2.width, w.hidden,
               this->p.eta_project, [=](int64_t pixel, int64_t v, Vec value) {
                 at(result + pixel * width + v * kLanes) += value;
               });
      write_row(y, row, at_x, 0, result);
      write_row(y, row, at_x, 1, z1);
    }
  }
};

// ---- inverse ----

// The stream the other way: z2 comes first, then z1 from rho and eta, then phi takes z2 back.
template <Activation kind, class Operand>
struct Inverse : Stream<kind, Operand> {
  using Base = Stream<kind, Operand>;
  BasicRows<Operand> depthwise2;
  Rows out;

  Inverse(const CouplingShape& shape, const void* packed, const CouplingTile& tile, Arena& arena)
      : Base(shape, packed, tile, 2, 3, 3, 1, arena),
        depthwise2(1, kCouplingTileColumns + 2, this->w.padded_hidden, arena),
        out(1, kCouplingTileColumns, 2 * this->w.padded_half, arena) {}

  void run(ImageView y, MutableImageView x) {
    const Widths& w = this->w;
    const int64_t last = this->last_row();
    this->start(y);
    for (int64_t row = this->tile.y_begin; row < this->tile.y_end; ++row) {
      for (; this->next_z2 <= smaller(row + 1, last); ++this->next_z2) {
        for (; this->next_hidden1 <= smaller(this->next_z2 + 1, last); ++this->next_hidden1) {
          read_row(y, this->next_hidden1);
          this->hidden2_row(this->next_hidden1, this->columns(2));
        }
        recover_z1(this->next_z2);
        this->hidden1_row(this->next_z2, this->columns(1));
      }
      const Range at_x = this->columns(0);
      this->add_phi_row(row, at_x, -1.0f);
      float* result = out.data;
      // The mix's inverse comes as the mix, with both halves padded.
      const float* const halves[2] = {this->z.row(row, at_x.begin),
                                      this->z.row(row, at_x.begin) + w.padded_half};
      multiply(at_x.size(), out.width / kLanes, halves, this->z.width, w.half, this->p.mix,
               [&](int64_t pixel, int64_t v, Vec value) {
                 at(result + pixel * out.width + v * kLanes) =
                     value + at(this->p.bias + v * kLanes);
               });
      for (int64_t half = 0; half < 2; ++half) {
        write_pixels(x, this->tile.batch, row, at_x.begin, at_x.size(), half * w.half, w.half,
                     result + half * w.padded_half, out.width);
      }
    }
  }

  void read_row(ImageView y, int64_t row) {
    const Widths& w = this->w;
    const Range at_x = this->columns(2);
    for (int64_t half = 0; half < 2; ++half) {
      read_pixels(y, this->tile.batch, row, at_x.begin, at_x.size(), half * w.half, w.half,
                  this->z.row(row, at_x.begin) + half * w.padded_half, this->z.width);
    }
  }

  // z1 = (z1 - eta(z2)) exp(-rho(z2)) at one row.
  void recover_z1(int64_t row) {
    const Widths& w = this->w;
    const Range at_x = this->columns(1);
    Operand* values = depthwise2.data;
    float* z1 = this->z.row(row, at_x.begin);
    const int64_t width = this->z.width;
    this->depthwise2_row(row, at_x, 1, values);
    multiply(at_x.size(), w.padded_half / kLanes, values, depthwise2.width, w.hidden,
             this->p.eta_project, [&](int64_t pixel, int64_t v, Vec value) {
               at(z1 + pixel * width + v * kLanes) -= value;
             });
    this->depthwise2_row(row, at_x, 0, values);
    multiply(at_x.size(), w.padded_half / kLanes, values, depthwise2.width, w.hidden,
             this->p.rho_project, [&](int64_t pixel, int64_t v, Vec value) {
               at(z1 + pixel * width + v * kLanes) *= expm(-this->log_scale(value));
             });
  }
};

// ---- gradients of the weights ----

// Sums over one or more tiles. Matrices are [input][output], rho and eta side by side where the
// packed weights are.
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

int64_t gradient_floats(const CouplingShape& shape) {
  Arena arena{nullptr};
  const Widths w(shape);
  Gradients(w, arena);
  return static_cast<int64_t>(arena.used / sizeof(float));
}

// total(k, n) += sum over pixels of a(pixel, k) g(pixel, n).
inline void add_products(int64_t pixels, int64_t rows, int64_t vectors, const float* a,
                         int64_t a_width, const float* g, int64_t g_width, float* total) {
  for_each_sized_block(rows, vectors, [&](int64_t m, int64_t n, int64_t height, int64_t width) {
    Vec block[kBlockRows * kBlockVectors];
    const auto sum = [&](int64_t i, int64_t j) -> Vec& {
      return at(total + ((m + i) * vectors + n + j) * kLanes);
    };
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) block[i * width + j] = sum(i, j);
    }
    multiply_add(block, height, width, a + m, 1, a_width, g + n * kLanes, g_width, pixels);
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) sum(i, j) = block[i * width + j];
    }
  });
}

inline void add_depthwise_products(const BlockedRows& layout, const float* const (&rows)[3],
                                   const BlockedRows& gradient, const float* g, int64_t pixels,
                                   float* total) {
  const int64_t width = layout.width;
  for (int64_t c = 0; c < width; c += kLanes) {
    Vec sums[kTaps];
    for (int64_t tap = 0; tap < kTaps; ++tap) sums[tap] = at(total + tap * width + c);
    for (int64_t p = 0; p < pixels; ++p) {
      const Vec value = at(g + c * gradient.columns + p * kLanes);
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        sums[tap] += value * at(rows[tap / 3] + c * layout.columns + (p + tap % 3) * kLanes);
      }
    }
    for (int64_t tap = 0; tap < kTaps; ++tap) at(total + tap * width + c) = sums[tap];
  }
}

void unpack_gradients(const CouplingShape& shape, const float* gradients,
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

// ---- backward ----

// Row y of the transposed depthwise convolution with its reflections: each pixel gathers from the
// pixels whose (reflected) window holds it.
template <class Store>
inline void depthwise_transposed(const BlockedRows& g, int64_t y, Range at_x, const float* weights,
                                 int64_t height, int64_t image_width, const Store& store) {
  const int64_t width = g.width;
  const float* rows[3];
  for (int64_t j = 0; j < 3; ++j) {
    const int64_t source = y - 1 + j;
    rows[j] = g.row(source < 0 || source >= height ? y : source, at_x.begin - 1);
  }
  for (int64_t c = 0; c < width; c += kLanes) {
    const float* const row[3] = {rows[0] + c * g.columns, rows[1] + c * g.columns,
                                 rows[2] + c * g.columns};
    // What the three columns of the kernel weigh in each row.
    Vec by_row[3][3] = {};
    for (int64_t j = 0; j < 3; ++j) {
      const int64_t source = y - 1 + j;
      if (source < 0 || source >= height) continue;
      for (int64_t ky = 0; ky < 3; ++ky) {
        if (reflect(source + ky - 1, height) != y) continue;
        for (int64_t kx = 0; kx < 3; ++kx) by_row[j][kx] += at(weights + (ky * 3 + kx) * width + c);
      }
    }
    const auto border = [&](int64_t x) {
      Vec total = {};
      for (int64_t t = 0; t < 3; ++t) {
        const int64_t source = x - 1 + t;
        if (source < 0 || source >= image_width) continue;
        for (int64_t kx = 0; kx < 3; ++kx) {
          if (reflect(source + kx - 1, image_width) != x) continue;
          for (int64_t j = 0; j < 3; ++j) {
            total += by_row[j][kx] * at(row[j] + (source + 1 - at_x.begin) * kLanes);
          }
        }
      }
      store(x - at_x.begin, c, total);
    };
    int64_t x = at_x.begin;
    for (; x < smaller(at_x.end, 2); ++x) border(x);
    for (; x < smaller(at_x.end, image_width - 2); ++x) {
      Vec totals[3] = {};
      for (int64_t t = 0; t < 3; ++t) {
        for (int64_t j = 0; j < 3; ++j) {
          totals[j] += by_row[j][2 - t] * at(row[j] + (x + t - at_x.begin) * kLanes);
        }
      }
      store(x - at_x.begin, c, totals[0] + totals[1] + totals[2]);
    }
    for (; x < at_x.end; ++x) border(x);
  }
}

// Stages and how far they run ahead of the gradient of x at row v (1 more with a 3 x 3 mix):
//   hidden1 4, z2 and hidden2 3, scale and grad2 (of rho's and eta's depthwise layer) 2,
//   grad_z2 and grad1 (of phi's) 1, grad_mixed 0
template <Activation kind, class Operand>
struct Backward : Stream<kind, Operand> {
  using Base = Stream<kind, Operand>;
  using Ops = Operands<Operand>;
  const int64_t radius;  // of the mix
  const bool with_weights;
  Rows upstream, scale;
  BasicRows<Operand> depthwise2, grad_rho;
  BlockedRows grad2;
  BasicRows<Operand> grad_hidden2;
  Rows grad_z2;
  BlockedRows grad1;
  BasicRows<Operand> grad_hidden1;
  Rows mixed, columns_of_x, out;
  int64_t next_grad2 = 0, next_grad1 = 0, next_mixed = 0;
  ImageView grad{};

  // Sums over so many pixels are taken of float32.
  static constexpr bool kWeightGradients = sizeof(Operand) == sizeof(float);

  static int64_t room(int64_t reach) { return kCouplingTileColumns + 2 * reach; }

  Backward(const CouplingShape& shape, const void* packed, const CouplingTile& tile,
           bool with_weights, Arena& arena)
      : Base(shape, packed, tile, 4 + shape.kernel / 2, 5, 3, 3, arena),
        radius(shape.kernel / 2),
        with_weights(with_weights),
        upstream(3, room(this->halo), this->z.width, arena),
        scale(3, room(this->halo), this->w.padded_half, arena),
        depthwise2(2, room(this->halo), this->w.padded_hidden, arena),
        grad_rho(1, room(this->halo), this->w.padded_half, arena),
        grad2(3, room(this->halo), this->hidden2.width, arena),
        grad_hidden2(1, room(this->halo), this->hidden2.width, arena),
        grad_z2(2, room(this->halo), this->w.padded_half, arena),
        grad1(3, room(this->halo), this->hidden1.width, arena),
        grad_hidden1(1, room(this->halo), this->hidden1.width, arena),
        mixed(1, room(this->halo), this->z.width, arena),
        columns_of_x(3, room(this->halo), round_up(this->w.inputs, kLanes), arena),
        out(1, room(this->halo), shape.inputs, arena) {
    this->place(upstream, scale, depthwise2, grad_rho, grad2, grad_hidden2, grad_z2, grad1,
                grad_hidden1, mixed, columns_of_x, out);
  }

  // The pixels of row y whose products count for this tile's weight gradients.
  bool own(int64_t y) const {
    return with_weights && y >= this->tile.y_begin && y < this->tile.y_end;
  }

  // At row y: rho, the scale, and the gradient before the depthwise layers of rho and eta.
  void grad2_row(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range at_x = this->columns(radius + 2);
    const int64_t first = at_x.begin, half_vectors = w.padded_half / kLanes;
    for (int64_t half = 0; half < 2; ++half) {
      float* row = upstream.row(y, first) + half * w.padded_half;
      read_pixels(grad, this->tile.batch, y, first, at_x.size(), half * w.half, w.half, row,
                  upstream.width);
    }
    // rho's layer and eta's, as two rows
    Operand *rho = depthwise2.row(0, first), *eta = depthwise2.row(1, first);
    this->depthwise2_row(y, at_x, 0, rho);
    this->depthwise2_row(y, at_x, 1, eta);
    const float *z1 = this->z.row(y, first), *g1 = upstream.row(y, first);
    float* scales = scale.row(y, first);
    Operand* grads = grad_rho.row(y, first);
    const float clamp = this->shape.clamp;
    multiply(at_x.size(), half_vectors, rho, depthwise2.width, w.hidden, this->p.rho_project,
             [&](int64_t pixel, int64_t v, Vec raw) {
               const Vec log_scale = this->log_scale(raw), s = expm(log_scale);
               const int64_t i = pixel * upstream.width + v * kLanes;
               Vec result = at(g1 + i) * at(z1 + i) * s;
               if (clamp > 0) {
                 const Vec t = log_scale / clamp;
                 result *= 1.0f - t * t;
               }
               at(scales + pixel * scale.width + v * kLanes) = s;
               Ops::put(grads + pixel * scale.width + v * kLanes, result);
             });
    float* target = grad2.row(y, first);
    const auto store = [&](const Operand* values, int64_t subnet) {
      float* const half = target + subnet * w.padded_hidden * grad2.columns;
      return [=, this](int64_t pixel, int64_t v, Vec value) {
        const Vec layer = Ops::get(values + pixel * depthwise2.width + v * kLanes);
        at(half + (v * grad2.columns + pixel) * kLanes) = through<kind>(layer, value);
      };
    };
    const int64_t vectors = w.padded_hidden / kLanes;
    multiply(at_x.size(), vectors, grads, scale.width, w.half, this->p.rho_project_transposed,
             store(rho, 0));
    const auto upstream1 = this->operand(g1, upstream.width, at_x.size());
    multiply(at_x.size(), vectors, upstream1.data, upstream1.width, w.half,
             this->p.eta_project_transposed, store(eta, 1));
    if constexpr (kWeightGradients) {
      if (own(y)) grad2_products(y, g);
    }
  }

  void grad2_products(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range mine = this->columns(0);
    const int64_t x = mine.begin, pixels = mine.size(), half_vectors = w.padded_half / kLanes;
    add_products(pixels, w.hidden, half_vectors, depthwise2.row(0, x), depthwise2.width,
                 grad_rho.row(y, x), grad_rho.width, g.rho_project);
    add_products(pixels, w.hidden, half_vectors, depthwise2.row(1, x), depthwise2.width,
                 upstream.row(y, x), upstream.width, g.eta_project);
    const float* sources[3];
    this->around(this->hidden2, y, x, sources);
    add_depthwise_products(this->hidden2, sources, grad2, grad2.row(y, x), pixels,
                           g.pair_depthwise);
  }

  // At row y: the gradient of the new z2, and that before phi's depthwise layer.
  void grad1_row(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range at_x = this->columns(radius + 1);
    const int64_t first = at_x.begin, half_vectors = w.padded_half / kLanes;
    Operand* hidden_gradient = grad_hidden2.row(y, first);
    const float* hidden = this->hidden2.row(y, first);
    depthwise_transposed(
        grad2, y, at_x, this->p.pair_depthwise, this->shape.height, this->shape.width,
        [&](int64_t pixel, int64_t c, Vec value) {
          const Vec layer = at(hidden + c * this->hidden2.columns + pixel * kLanes);
          Ops::put(hidden_gradient + pixel * grad2.width + c, through<kind>(layer, value));
        });
    const float* g2 = upstream.row(y, first) + w.padded_half;
    float* target = grad_z2.row(y, first);
    multiply(at_x.size(), half_vectors, hidden_gradient, grad_hidden2.width, grad_hidden2.width,
             this->p.pair_expand_transposed, [&](int64_t pixel, int64_t v, Vec value) {
               at(target + pixel * grad_z2.width + v * kLanes) =
                   value + at(g2 + pixel * upstream.width + v * kLanes);
             });
    const Operand* values = this->depthwise1.row(y, first);
    float* before = grad1.row(y, first);
    const auto of_z2 = this->operand(target, grad_z2.width, at_x.size());
    multiply(at_x.size(), grad1.width / kLanes, of_z2.data, of_z2.width, w.half,
             this->p.phi_project_transposed, [&](int64_t pixel, int64_t v, Vec value) {
               const Vec layer = Ops::get(values + pixel * grad1.width + v * kLanes);
               at(before + (v * grad1.columns + pixel) * kLanes) = through<kind>(layer, value);
             });
    if constexpr (kWeightGradients) {
      if (own(y)) grad1_products(y, g);
    }
  }

  void grad1_products(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range mine = this->columns(0);
    const int64_t x = mine.begin, pixels = mine.size(), half_vectors = w.padded_half / kLanes;
    add_products(pixels, w.half, grad_hidden2.width / kLanes, this->z.row(y, x) + w.padded_half,
                 this->z.width, grad_hidden2.row(y, x), grad_hidden2.width, g.pair_expand);
    add_products(pixels, w.hidden, half_vectors, this->depthwise1.row(y, x), grad1.width,
                 grad_z2.row(y, x), grad_z2.width, g.phi_project);
    const float* sources[3];
    this->around(this->hidden1, y, x, sources);
    add_depthwise_products(this->hidden1, sources, grad1, grad1.row(y, x), pixels, g.phi_depthwise);
  }

  // At row y: the gradient of what the mix gave, and its products with the mix.
  void mixed_row(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range at_x = this->columns(radius);
    const int64_t first = at_x.begin, half_vectors = w.padded_half / kLanes;
    Operand* hidden_gradient = grad_hidden1.row(y, first);
    const float* hidden = this->hidden1.row(y, first);
    depthwise_transposed(
        grad1, y, at_x, this->p.phi_depthwise, this->shape.height, this->shape.width,
        [&](int64_t pixel, int64_t c, Vec value) {
          const Vec layer = at(hidden + c * this->hidden1.columns + pixel * kLanes);
          Ops::put(hidden_gradient + pixel * grad1.width + c, through<kind>(layer, value));
        });
    float* target = mixed.row(y, first);
    const float *g1 = upstream.row(y, first), *scales = scale.row(y, first);
    const float* z2 = grad_z2.row(y, first);
    multiply(at_x.size(), half_vectors, hidden_gradient, grad1.width, w.hidden,
             this->p.phi_expand_transposed, [&](int64_t pixel, int64_t v, Vec value) {
               const int64_t i = pixel * mixed.width + v * kLanes;
               const int64_t j = pixel * scale.width + v * kLanes;
               at(target + i) = value + at(g1 + i) * at(scales + j);
               at(target + i + w.padded_half) = at(z2 + j);
             });
    float* products = columns_of_x.row(y, first);
    multiply(at_x.size(), columns_of_x.width / kLanes, target, mixed.width, mixed.width,
             this->p.mix_transposed, [&](int64_t pixel, int64_t v, Vec value) {
               at(products + pixel * columns_of_x.width + v * kLanes) = value;
             });
    if constexpr (kWeightGradients) {
      if (own(y)) mixed_products(y, g);
    }
  }

  void mixed_products(int64_t y, const Gradients& g) {
    const Widths& w = this->w;
    const Range mine = this->columns(0);
    const int64_t x = mine.begin, pixels = mine.size();
    add_products(pixels, w.half, grad1.width / kLanes, this->z.row(y, x), this->z.width,
                 grad_hidden1.row(y, x), grad1.width, g.phi_expand);
    const float* gradient = mixed.row(y, x);
    for (int64_t c = 0; c < mixed.width; c += kLanes) {
      Vec total = at(g.bias + c);
      for (int64_t pixel = 0; pixel < pixels; ++pixel)
        total += at(gradient + pixel * mixed.width + c);
      at(g.bias + c) = total;
    }
    mix_products(y, mine, gradient, g.mix);
  }

  // The mix's own gradient, from the rows of x, which by now have left the ring.
  void mix_products(int64_t y, Range mine, const float* gradient, float* total) {
    const int64_t inputs = this->shape.inputs;
    float* row = out.row(y, mine.begin);
    for (int64_t ky = -radius; ky <= radius; ++ky) {
      const int64_t source = y + ky;
      if (source < 0 || source > this->last_row()) continue;
      const Range wide = this->columns(radius);
      read_pixels(this->x, this->tile.batch, source, wide.begin, wide.size(), 0, inputs,
                  out.row(y, wide.begin), inputs);
      if (radius > 0 && wide.begin == 0) this->clear(out.row(y, -1), inputs);
      if (radius > 0 && wide.end == this->shape.width) {
        this->clear(out.row(y, this->shape.width), inputs);
      }
      for (int64_t kx = -radius; kx <= radius; ++kx) {
        const int64_t tap = (ky + radius) * this->shape.kernel + kx + radius;
        add_products(mine.size(), inputs, mixed.width / kLanes, row + kx * inputs, inputs, gradient,
                     mixed.width, total + tap * inputs * mixed.width);
      }
    }
  }

  // The gradient of x at row y, from the products of the rows around it.
  void store_row(int64_t y, MutableImageView grad_x) {
    const Range at_x = this->columns(0);
    const int64_t inputs = this->shape.inputs;
    const float* row = columns_of_x.row(y, at_x.begin);
    if (radius == 0) {
      write_pixels(grad_x, this->tile.batch, y, at_x.begin, at_x.size(), 0, inputs, row,
                   columns_of_x.width);
      return;
    }
    float* sums = out.row(y, at_x.begin);
    this->clear(sums, at_x.size() * inputs);
    for (int64_t ky = 0; ky < 3; ++ky) {
      const int64_t source = y + 1 - ky;
      if (source < 0 || source > this->last_row()) continue;
      for (int64_t kx = 0; kx < 3; ++kx) {
        const Range from{larger(at_x.begin, kx - 1), smaller(at_x.end, this->shape.width + kx - 1)};
        const float* terms = columns_of_x.row(source, from.begin + 1 - kx) + (ky * 3 + kx) * inputs;
        float* target = out.row(y, from.begin);
        for (int64_t pixel = 0; pixel < from.size(); ++pixel) {
          for (int64_t c = 0; c < inputs; ++c) {
            target[pixel * inputs + c] += terms[pixel * columns_of_x.width + c];
          }
        }
      }
    }
    write_pixels(grad_x, this->tile.batch, y, at_x.begin, at_x.size(), 0, inputs, sums, inputs);
  }

  void run(ImageView grad_y, ImageView x, MutableImageView grad_x, const Gradients& g) {
    grad = grad_y;
    // The padding of the halves is never read into and takes part in products with zeros.
    if (this->w.half < this->w.padded_half) {
      this->clear(upstream.data, upstream.ring * upstream.columns * upstream.width);
    }
    this->start(x);
    next_grad2 = this->rows(radius + 2).begin;
    next_grad1 = this->rows(radius + 1).begin;
    next_mixed = this->rows(radius).begin;
    const int64_t last = this->last_row();
    for (int64_t y = this->tile.y_begin; y < this->tile.y_end; ++y) {
      for (; next_mixed <= smaller(y + radius, last); ++next_mixed) {
        for (; next_grad1 <= smaller(next_mixed + 1, last); ++next_grad1) {
          for (; next_grad2 <= smaller(next_grad1 + 1, last); ++next_grad2) {
            this->need_hidden2(next_grad2 + 1);
            grad2_row(next_grad2, g);
          }
          grad1_row(next_grad1, g);
        }
        mixed_row(next_mixed, g);
      }
      store_row(y, grad_x);
    }
  }
};

// ---- entry points ----

// Calls run.template operator()<activation, operand>().
template <class Run>
inline void instantiate(const CouplingShape& shape, const Run& run) {
  const auto with_operand = [&]<class Operand>() {
    switch (shape.activation) {
      case Activation::relu6: run.template operator()<Activation::relu6, Operand>(); break;
      case Activation::softplus: run.template operator()<Activation::softplus, Operand>(); break;
      case Activation::leaky_relu:
        run.template operator()<Activation::leaky_relu, Operand>();
        break;
    }
  };
#if defined(MGHF_BFLOAT16_PRODUCTS)
  if (shape.bfloat16_products) {
#if defined(MGHF_AMX)
    [[maybe_unused]] const Tiles tiles;
#endif
    with_operand.template operator()<BFloat16>();
    return;
  }
#endif
  with_operand.template operator()<float>();
}

size_t packed_bytes(const CouplingShape& shape) {
  Arena arena{nullptr};
  const Widths w(shape);
  instantiate(shape, [&]<Activation, class Operand>() { Packed<Operand>(w, arena); });
  return arena.used;
}

void pack_weights(const CouplingShape& shape, const CouplingWeights& weights, void* packed) {
  instantiate(shape,
              [&]<Activation, class Operand>() { pack_weights<Operand>(shape, weights, packed); });
}

void forward(const CouplingShape& shape, const void* packed, const CouplingTile& tile, ImageView x,
             MutableImageView y, void* workspace) {
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena arena{static_cast<char*>(workspace)};
    Forward<kind, Operand>(shape, packed, tile, arena).run(x, y);
  });
}

void inverse(const CouplingShape& shape, const void* packed, const CouplingTile& tile, ImageView y,
             MutableImageView x, void* workspace) {
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena arena{static_cast<char*>(workspace)};
    Inverse<kind, Operand>(shape, packed, tile, arena).run(y, x);
  });
}

void backward(const CouplingShape& shape, const void* packed, const CouplingTile& tile,
              ImageView grad, ImageView x, MutableImageView grad_x, float* gradients,
              void* workspace) {
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena arena{static_cast<char*>(workspace)}, sums{reinterpret_cast<char*>(gradients)};
    const Widths w(shape);
    const Gradients g(w, sums);
    Backward<kind, Operand>(shape, packed, tile, gradients != nullptr, arena)
        .run(grad, x, grad_x, g);
  });
}

size_t forward_workspace(const CouplingShape& shape) {
  size_t bytes = 0;
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena forward{nullptr}, inverse{nullptr};
    Forward<kind, Operand>(shape, nullptr, {}, forward);
    Inverse<kind, Operand>(shape, nullptr, {}, inverse);
    bytes = forward.used > inverse.used ? forward.used : inverse.used;
  });
  return bytes;
}

size_t backward_workspace(const CouplingShape& shape, bool with_weights) {
  Arena arena{nullptr};
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Backward<kind, Operand>(shape, nullptr, {}, with_weights, arena);
  });
  return arena.used;
}

}  // namespace

const CouplingKernels MGHF_KERNELS = {
    packed_bytes,       pack_weights, forward_workspace, forward,          inverse,
    backward_workspace, backward,     gradient_floats,   unpack_gradients,
};

}  // namespace mghf
