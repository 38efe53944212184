// The gradient of the op `coupling`: of its input and, if needed, of its weights.
#pragma once

#include "coupling_stream.h"

namespace mghf {
namespace {

// ---- products for the gradients of the weights ----

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
    // The weights of the kernel's three columns in each row.
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

// By how many rows each stage runs ahead of the gradient of x (1 more with a 3 x 3 mix):
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

  // Sums over this many pixels need float32 terms.
  static constexpr bool kWeightGradients = sizeof(Operand) == sizeof(float);

  static int64_t room(int64_t reach) { return kCouplingTileColumns + 2 * reach; }

  Backward(const CouplingOptions& shape, const void* packed, const CouplingTile& tile,
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

  // At row y: the gradient of the mix's output, and its products with the mix.
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

  // The gradient of the mix, from the rows of x, which are no longer in the ring.
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
    // The padding of the halves is never written, but it is multiplied with zeros.
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

}  // namespace
}  // namespace mghf
