// Shared by the forward, the inverse and the gradient of the op `coupling`: rows of a tile, and the
// stream through them up to the hidden layers of rho and eta.
#pragma once

#include "coupling_pointwise.h"
#include "coupling_weights.h"

namespace mghf {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Reflection by one pixel; a side of length one is repeated.
inline int64_t reflect(int64_t i, int64_t n) {
  if (n == 1) return 0;
  return i < 0 ? -i : i >= n ? 2 * (n - 1) - i : i;
}

// ---- rows ----

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The last `ring` rows of one stage, [pixel][channel], with one more pixel on either side than the
// stage computes, for reflections.
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
  const CouplingOptions& shape;
  const Widths w;
  const Packed<Operand> p;
  const CouplingTile& tile;
  const int64_t halo;  // pixels by which z1 and phi's hidden layer reach beyond the tile

  // All rows have room for the widest halo; each user chooses the rings.
  Rows input, z;
  BlockedRows hidden1;
  BasicRows<Operand> depthwise1;
  BlockedRows hidden2;
  Operand* rounded;  // one row of a half, for `operand`
  int64_t next_z2 = 0, next_hidden1 = 0, next_hidden2 = 0, next_input = 0;
  ImageView x;

  Stream(const CouplingOptions& shape, const void* packed, const CouplingTile& tile, int64_t halo,
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

  // A row of one half of the channels as an operand, rounded if necessary.
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

  // The three rows around y that a 3 x 3 kernel reads, at the pixel left of x.
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
      // The 3 x 3 mix has zero padding.
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

  // Advances the stream until the hidden layers of rho and eta reach row y: the first half of the
  // forward.
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

  // The logarithm of the scale, from rho's output.
  Vec log_scale(Vec raw) const {
    return shape.clamp > 0 ? shape.clamp * tanh(raw / shape.clamp) : raw;
  }
};

}  // namespace
}  // namespace mghf
