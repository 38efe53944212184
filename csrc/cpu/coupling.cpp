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
// their input, so their first layers are one product. Activations are applied as a product's block
// is stored, and the slopes for the gradient are read off the activations' values. The gradient
// recomputes the forward in the same stream, four rows ahead.
//
// bfloat16 images on CPUs with instructions for it: the products' operands are rounded to bfloat16,
// the sums and everything between two products stay float32. The mix, often of few channels, stays
// float32 altogether, and so do weight gradients.
//
// Floor at C = 128: 3 x 17,536 multiply-adds a pixel forward plus those of the mix, 16,384, or
// 3,456 with the stem folded into it; about twice that backward. Memory traffic, 1 KiB a pixel
// forward, takes far less time.

#include "coupling.h"

#include "coupling_backward.h"
#include "coupling_stream.h"

namespace mghf {
namespace {

// ---- forward ----

template <Activation kind, class Operand>
struct Forward : Stream<kind, Operand> {
  using Base = Stream<kind, Operand>;
  BasicRows<Operand> depthwise2;
  Rows out;

  Forward(const CouplingOptions& shape, const void* packed, const CouplingTile& tile, Arena& arena)
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

// The inverse stream: z2 comes first, then z1 from rho and eta, then phi(z1) is subtracted.
template <Activation kind, class Operand>
struct Inverse : Stream<kind, Operand> {
  using Base = Stream<kind, Operand>;
  BasicRows<Operand> depthwise2;
  Rows out;

  Inverse(const CouplingOptions& shape, const void* packed, const CouplingTile& tile, Arena& arena)
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
      // The inverse of the mix is packed as the mix, with both halves padded.
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

// ---- entry points ----

// Calls run.template operator()<activation, operand>().
template <class Run>
inline void instantiate(const CouplingOptions& shape, const Run& run) {
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

size_t packed_bytes(const CouplingOptions& shape) {
  Arena arena{nullptr};
  const Widths w(shape);
  instantiate(shape, [&]<Activation, class Operand>() { Packed<Operand>(w, arena); });
  return arena.used;
}

void pack_weights(const CouplingOptions& shape, const CouplingWeights& weights, void* packed) {
  instantiate(shape,
              [&]<Activation, class Operand>() { pack_weights<Operand>(shape, weights, packed); });
}

void forward(const CouplingOptions& shape, const void* packed, const CouplingTile& tile,
             ImageView x, MutableImageView y, void* workspace) {
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena arena{static_cast<char*>(workspace)};
    Forward<kind, Operand>(shape, packed, tile, arena).run(x, y);
  });
}

void inverse(const CouplingOptions& shape, const void* packed, const CouplingTile& tile,
             ImageView y, MutableImageView x, void* workspace) {
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena arena{static_cast<char*>(workspace)};
    Inverse<kind, Operand>(shape, packed, tile, arena).run(y, x);
  });
}

void backward(const CouplingOptions& shape, const void* packed, const CouplingTile& tile,
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

size_t forward_workspace(const CouplingOptions& shape) {
  size_t bytes = 0;
  instantiate(shape, [&]<Activation kind, class Operand>() {
    Arena forward{nullptr}, inverse{nullptr};
    Forward<kind, Operand>(shape, nullptr, {}, forward);
    Inverse<kind, Operand>(shape, nullptr, {}, inverse);
    bytes = forward.used > inverse.used ? forward.used : inverse.used;
  });
  return bytes;
}

size_t backward_workspace(const CouplingOptions& shape, bool with_weights) {
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
