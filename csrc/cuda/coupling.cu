// The invertible block and the gradient of its input.
//
//     (z1, z2) = M x + b                        M 1x1, or 3x3 with zero padding
//     S(f) = P A(D A(E f))                      phi, rho, eta: A the activation, D 3x3, reflected
//     z2 <- z2 + phi(z1)
//     y1 = z1 exp(r) + eta(z2),  r = rho(z2)    or r = k tanh(rho(z2) / k);   y2 = z2
//
// and back, T marking a transposed matrix, A' a slope, and (g1, g2) the gradient of y:
//
//     d_r = g1 z1 exp(r) (1 - (r / k)^2)
//     S^T(g; f) = E^T (A' D^T (A' P^T g))       A' at what S(f) has there
//     d2 = g2 + rho^T(d_r; z2) + eta^T(g1; z2)
//     d1 = g1 exp(r) + phi^T(d2; z1),           d_x = M^T (d1, d2)
//
// Method. Only features are in memory, [pixel][channel], C or 2 C of them for a pixel; of the
// hidden layers, twice as wide, only a slice of 16 or 32 channels of a tile of pixels is ever
// there, in the shared memory of the block that computes it. A block of a sub-network's kernel
// holds the features of its tile and of a halo, as far as 3x3 layers reach, and for each slice
//
//     1. makes the slice of A(E f) from them, on the tensor cores, halo included;
//     2. makes D of it in registers, where it lies as a factor of the next product, which adds the
//        slice's part of P A(D ...) to sums that stay in registers.
//
// For relu6 and leaky_relu a forward whose gradient will be wanted keeps exp(r), for a 1x1 mix z1,
// and the slopes A' as bits (coupling_state.h): 352 or 608 bytes a pixel for C = 128 in float32.
// The gradient then computes no hidden layer again, and its kinks are the forward's bit by bit. Two
// kernels go back through the sub-networks (coupling_kept.h): rho and eta, which make d_r while
// they read it, then phi. A block holds the gradients of its tile with a halo of 1 and the bits,
// and for each slice
//
//     1. makes A' P^T g with that halo, on the tensor cores;
//     2. makes A' D^T of it in registers, where it lies as a factor of the next product, with E^T.
//
// phi's has d1 in registers, and d2 in its tile, so for a 1x1 mix it also makes M^T (d1, d2). A 3x3
// mix takes a kernel that makes the products of a tile with all taps in shared memory and adds up
// there those that reach a pixel; and z1 is mixed again.
//
// Without that, for softplus or where nothing was kept, the gradient's blocks (coupling_backward.h)
// make A(E f) again on a halo of 2, then A' P^T g on a halo of 1, and last E^T A' D^T of that.
//
// A pixel of a halo that lies outside of the image is the one it is a reflection of; D^T instead
// has a few more terms for the pixels next to a border (`transposed_at_border`).
//
// The inverse goes the other way, in float32 whatever the image is: only then it undoes a rounding.
//
//     z1 = (y1 - eta(y2)) exp(-r),  z2 = y2 - phi(z1),  x = N (z1, z2) + e,  N = M^-1, e = -N b
//
// Where there are products of warpgroups the forward of relu6 or leaky_relu and up to 64 features
// streams rows of hidden values past weights that stay in shared memory instead (coupling_rows.h,
// coupling_mix_rows.h), as do the gradient's kernels from what it kept (coupling_rows_gradient.h).
//
// Kernels: forward   mix, phi, rho and eta;
//          gradient  rho^T and eta^T, phi^T with mix^T; for a 3x3 mix z1 before and mix^T after them;
//          the same, recomputed   mix, phi, rho with d_r, rho^T and eta^T, phi^T, mix^T;
//          inverse   pack, copy, eta, rho, phi, mix.
//
// Weights are packed by a kernel of their own, for frozen ones once.
//
// Products of float32 are three of TF32, the gradient's three of bfloat16; those of halves one, of
// factors rounded as the image is. Sums, the 3x3 layers and all that is pointwise are float32.
//
// Predicted floor for B = 1, C = 128, 512 x 512, float32, a 1x1 mix: 65,536 multiply-adds a pixel
// by three products, 103 GFLOP, 0.34 ms of TF32 at 300 TFLOP/s, and 3,456 of the 3x3 layers, 0.03
// ms; x and y, 268 MB, 0.06 ms at 4.3 TB/s, features between the kernels as much again. Halos make
// 1.25 of the sub-networks' products: 0.41 ms; with what it keeps, 159 MB, 0.04 ms more. Of the
// gradient, predicted: 65,536 multiply-adds by three products of bfloat16 at 600 TFLOP/s, 0.17 ms;
// halos of 1 make 1.5 of P^T's three eighths, 0.20 ms. Recomputed it has 57,344 more by TF32, and
// with the halos, and the hidden layers of rho and phi computed twice, 0.55 + 0.20 ms. With the
// papers' stem in the mix, of 27 terms, it is 97 thousand multiply-adds a pixel recomputed and 54
// thousand from what was kept.
#include "coupling.h"

#include "coupling_backward.h"
#include "coupling_forward.h"
#include "coupling_kept.h"
#include "coupling_mix.h"
#include "coupling_mix_rows.h"
#include "coupling_rows.h"
#include "coupling_rows_gradient.h"
#include "coupling_workspace.h"

namespace mghf::cuda {

namespace {

// Some of the images.
template <class I>
I part_of(I images, int64_t first, int64_t count) {
  images.data += first * images.batch_stride;
  images.batch = count;
  return images;
}

// Features of some rows as images, with all of a pixel's channels; row 0 is the first of these
// rows.
template <class T>
MutableImage<T> image_of(const Features<T>& f, int64_t batch, int64_t height, int64_t width) {
  return {f.data, batch, f.width, height, width, height * width * f.width, 1, width * f.width,
          f.width};
}
template <class T>
Image<T> read_only(const MutableImage<T>& i) {
  return {i.data,         i.batch,          i.channels,   i.height,       i.width,
          i.batch_stride, i.channel_stride, i.row_stride, i.column_stride};
}

// A call, for some of its images or for some rows of one.
template <class T>
struct PartialCall {
  const CouplingShape& shape;
  const PackedWeights& packed;
  int64_t batch, height, width, shared_bytes;
  bool streams;  // whether the forward is for stream_rows, or the gradient for kept_rows
  Rows result, kept;  // rows of the result, and rows that have features
  Stream stream;

  int64_t half() const { return padded_half(shape); }
  int64_t pixels() const { return batch * kept.count() * width; }
  Rows around(int halo) const { return result.wider(halo, height); }

  // Rows of features as images whose rows have the numbers of the image's.
  template <class U>
  MutableImage<U> image_of(const Features<U>& f) const {
    MutableImage<U> image = cuda::image_of(f, batch, kept.count(), width);
    image.data -= kept.first * image.row_stride;
    return image;
  }

  // For `rows` of x and of the result. `columns` of the weights' are computed or lie beyond.
  template <class P, int kKernel, class Result>
  const char* mix(const Channels<T>& x, MutableChannels<Result> result, const Packed& weights,
                  const float* bias, int64_t terms, int64_t columns, const Rows& rows) const {
    const int64_t count = batch * rows.count() * width;
    const int64_t blocks = (count + kMixPixels - 1) / kMixPixels *
                           ((result.count + kMixColumns - 1) / kMixColumns);
    result.image.data += rows.first * result.image.row_stride;
    const Mix<T, Result> m{x,
                           result,
                           weights,
                           static_cast<int>((columns + kGroup - 1) / kGroup),
                           bias,
                           static_cast<int>(count),
                           rows.count(),
                           static_cast<int>(width),
                           rows.first,
                           static_cast<int>(terms)};
    return launch(cuda::mix<T, Result, P, kKernel>, {blocks, kMixThreads}, stream, m);
  }

  // z, or its first `count` channels.
  const char* features(const Image<T>& x, const Features<T>& z, int64_t count) const {
    const Channels<T> from = channels_of(x, 0, shape.inputs);
    const MutableChannels<T> to = channels_of(image_of(z), 0, count);
    const int64_t terms = terms_of(shape), all = 2 * half();
    if (streams && count == all && packed.mix_rows != nullptr) {
      MutableChannels<T> rows = to;
      rows.image.data += kept.first * to.image.row_stride;
      const Mix<T, T> m{from, rows, {nullptr, false}, 0, packed.bias, static_cast<int>(pixels()),
                        kept.count(), static_cast<int>(width), kept.first, static_cast<int>(terms)};
      return launch_mix_rows<T>(m, packed.mix_rows, shape.kernel,
                                mix_depths(terms, shape.kernel, half()), half(),
                                packed.rows_once, stream);
    }
    return shape.kernel == 1
               ? mix<Exact<T>, 1>(from, to, packed.mix, packed.bias, terms, all, kept)
               : mix<Exact<T>, 3>(from, to, packed.mix, packed.bias, terms, all, kept);
  }

  Tiling tiling(int rows, const Rows& computed) const {
    return {static_cast<int>(batch), static_cast<int>(height), static_cast<int>(width), rows, kept,
            computed};
  }

  Stage<T> stage(const Features<T>& features, int rows, const Rows& computed) const {
    return {tiling(rows, computed),
            features,
            static_cast<int>(shape.channels / 2),
            static_cast<int>(shape.channels),
            shape.activation,
            shape.clamp,
            {}};
  }

  template <class Byte>
  StateOf<Byte> state_at(const CouplingState<Byte>& state) const {
    return {state.data,
            static_cast<int>(height),
            static_cast<int>(width),
            static_cast<int>(half()),
            static_cast<int>(state_bytes(half(), sizeof(T), shape.kernel)),
            shape.kernel == 1};
  }

  // `fill` completes the stage's parameters.
  template <class Fill>
  const char* forward(Role role, const Features<T>& features, const Rows& rows,
                      const Fill& fill) const {
    switch (half()) {
      case 32:
        return forward<32, 8, 2, 32>(role, features, rows, fill);
      case 64:
        return forward<64, 8, 2, 32>(role, features, rows, fill);
      default:
        return forward<128, 4, 1, 16>(role, features, rows, fill);
    }
  }
  template <int kHalf, int kRows, int kRowsOfWarp, int kSlice, class Fill>
  const char* forward(Role role, const Features<T>& features, const Rows& rows,
                      const Fill& fill) const {
    using Plain = ForwardSizes<T, kHalf, kRows, kRowsOfWarp, kSlice, false>;
    using Keeping = ForwardSizes<T, kHalf, kRows, kRowsOfWarp, kSlice, true>;
    ForwardStage<T> s{stage(features, kRows, rows), role, role == Role::couple ? 2 : 1, {}, {},
                      {}, {}, {}, 1.0f, false, {}};
    fill(s);
    const int64_t tiles = s.tiling.count();
    return !s.keeps
               ? launch(forward_stage<T, Plain>, {tiles, Plain::kThreads, Plain::kBytes}, stream, s)
               : launch(forward_stage<T, Keeping>, {tiles, Keeping::kThreads, Keeping::kBytes},
                        stream, s);
  }

  template <class Fill>
  const char* backward(const Features<T>& features, const Rows& rows, const Fill& fill) const {
    if (half() == 32) return backward<BackwardSizes<T, 32, 8, 2, 1, 4, 16>>(features, rows, fill);
    if (half() == 64) {
      using Large = BackwardSizes<T, 64, 8, 2, 2, 8, 32>;
      if (sizeof(T) == 2 || shared_bytes >= static_cast<int64_t>(Large::kBytes)) {
        return backward<Large>(features, rows, fill);
      }
      if constexpr (sizeof(T) == 4) {
        return backward<BackwardSizes<T, 64, 4, 1, 1, 4, 16>>(features, rows, fill);
      }
    }
    using Large = BackwardSizes<T, 128, 4, 1, 1, 4, 16>;
    if (sizeof(T) == 2 || shared_bytes >= static_cast<int64_t>(Large::kBytes)) {
      return backward<Large>(features, rows, fill);
    }
    if constexpr (sizeof(T) == 4) {
      return backward<BackwardSizes<T, 128, 1, 1, 1, 4, 16>>(features, rows, fill);
    }
    return nullptr;
  }
  template <class Z, class Fill>
  const char* backward(const Features<T>& features, const Rows& rows, const Fill& fill) const {
    BackwardStage<T> s{stage(features, Z::kRows, rows), 0, {}, {}, {}};
    fill(s);
    return launch(backward_stage<T, Z>, {s.tiling.count(), Z::kThreads, Z::kBytes}, stream, s);
  }

  // Computes z from x, and adds phi to all kept rows but the outermost; also writes the second half
  // of y if there is one, and keeps phi's slopes if there is a state.
  const char* start(const Image<T>& x, const Features<T>& z, const MutableImage<T>& y,
                    const Rows& rows, const CouplingState<unsigned char>& state) const {
    if (const char* error = features(x, z, 2 * half()); error != nullptr) return error;
    return forward(Role::add, z, rows, [&](ForwardStage<T>& s) {
      s.other = {z.data + half(), z.width};
      s.subnets[0] = packed.phi;
      s.y = channels_of(y, shape.channels / 2, shape.channels / 2);
      s.keeps = state.exists;
      s.state = state_at(state);
    });
  }

  const char* value_by_rows(const Image<T>& x, const MutableImage<T>& y,
                            const CouplingState<unsigned char>& state, const Features<T>& z) const {
    const int64_t c = shape.channels / 2;
    const Features<T> z2{z.data + half(), z.width};
    const RowsOptions options{half(), shape.activation == Activation::leaky_relu, state.exists,
                              packed.rows_once};
    const char* error = features(x, z, 2 * half());
    if (error != nullptr) return error;
    error = launch_rows<T>({tiling(1, around(1)), {}, z, Role::add, {packed.phi.rows}, z2,
                            channels_of(y, c, c), shape.clamp, state_at(state)},
                           options, stream);
    if (error != nullptr) return error;
    return launch_rows<T>({tiling(1, result), {}, z2, Role::couple,
                           {packed.rho.rows, packed.eta.rows}, z, channels_of(y, 0, c), shape.clamp,
                           state_at(state)},
                          options, stream);
  }

  const char* value(const Image<T>& x, const MutableImage<T>& y,
                    const CouplingState<unsigned char>& state, Pieces pieces) const {
    const Features<T> z{pieces.take<T>(pixels() * 2 * half()), 2 * half()};
    if (streams) return value_by_rows(x, y, state, z);
    if (const char* error = start(x, z, y, around(1), state); error != nullptr) return error;
    return forward(Role::couple, {z.data + half(), z.width}, result, [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
      s.subnets[1] = packed.eta;
      s.y = channels_of(y, 0, shape.channels / 2);
      s.keeps = state.exists;
      s.state = state_at(state);
    });
  }

  // T is float; y may have another type.
  template <class Y>
  const char* inverse(const Image<Y>& y, const MutableImage<Y>& x, Pieces pieces) const {
    const int64_t wide = 2 * half(), count = pixels() * wide;
    const Features<T> z{pieces.take<T>(count), wide}, z2{z.data + half(), wide};
    const char* error = launch(copy_features<Y>,
                               {(count + kCopyThreads - 1) / kCopyThreads, kCopyThreads}, stream,
                               y, z, half(), y.by_maps(), kept);
    if (error != nullptr) return error;
    error = forward(Role::add, z2, around(1), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.eta;
      s.sign = -1;
    });
    if (error != nullptr) return error;
    error = forward(Role::unscale, z2, around(1), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
    });
    if (error != nullptr) return error;
    error = forward(Role::add, z, result, [&](ForwardStage<T>& s) {
      s.other = z2;
      s.subnets[0] = packed.phi;
      s.sign = -1;
    });
    if (error != nullptr) return error;
    return mix<ExactFloats, 1>(
        channels_of(read_only(image_of(z)), 0, wide), channels_of(x, 0, shape.channels), packed.mix,
        packed.bias, wide, shape.channels, result);
  }

  const char* gradient(const Image<T>& grad, const Image<T>& x, const MutableImage<T>& grad_x,
                       Pieces pieces) const {
    const int64_t c = shape.channels / 2, wide = 2 * half();
    const auto take = [&] { return Features<T>{pieces.take<T>(pixels() * wide), wide}; };
    const auto second = [&](const Features<T>& f) { return Features<T>{f.data + half(), wide}; };
    // Rows beyond its own that a product of a 3x3 mix reaches.
    const int reach = shape.kernel == 3 ? 1 : 0;
    const Features<T> z = take(), d = take();
    const Features<T> gradients = take();
    const char* error = start(x, z, {}, around(3 + reach), {});
    if (error != nullptr) return error;
    error = forward(Role::grad_rho, second(z), around(2 + reach), [&](ForwardStage<T>& s) {
      s.other = z;
      s.subnets[0] = packed.rho;
      s.g = channels_of(grad, 0, c);
      s.scaled = d;
      s.gradients = gradients;
    });
    if (error != nullptr) return error;
    error = backward(second(z), around(1 + reach), [&](BackwardStage<T>& s) {
      s.count = 2;
      s.subnets[0] = packed.rho;
      s.subnets[1] = packed.eta;
      s.gradients[0] = gradients;
      s.gradients[1] = second(gradients);
      s.direct = channels_of(grad, c, c);
      s.result = second(d);
    });
    if (error != nullptr) return error;
    const Image<T> all_d = read_only(image_of(d));
    error = backward(z, around(reach), [&](BackwardStage<T>& s) {
      s.count = 1;
      s.subnets[0] = packed.phi;
      s.gradients[0] = second(d);
      s.direct = channels_of(all_d, 0, half());
      s.result = d;
    });
    if (error != nullptr) return error;
    if (shape.kernel == 3) return unmix(d, grad_x);
    return mix<Fast<T>, 1>(channels_of(all_d, 0, wide), channels_of(grad_x, 0, shape.inputs),
                           packed.mix_transposed, nullptr, wide, shape.inputs, result);
  }

  // The gradient of x from (d1, d2), for a 3x3 mix.
  const char* unmix(const Features<T>& d, const MutableImage<T>& grad_x) const {
    const Unmix<T> m{tiling(kUnmixRows, result), d, static_cast<int>(2 * half() / kGroup),
                     packed.mix_transposed, grad_x};
    return launch(unmix_taps<T>, {m.tiling.count(), kUnmixThreads}, stream, m);
  }

  // The gradient from what the forward kept.
  const char* gradient(const Image<T>& grad, const Image<T>& x,
                       const CouplingState<const unsigned char>& state,
                       const MutableImage<T>& grad_x, Pieces pieces) const {
    const int64_t c = shape.channels / 2;
    const bool with_taps = shape.kernel == 3, with_d1 = with_taps || streams;
    const int64_t wide = with_d1 ? 2 * half() : half();
    const Features<T> d{pieces.take<T>(pixels() * wide), wide};
    const Features<T> d2{with_d1 ? d.data + half() : d.data, wide};
    if (with_taps) {
      // z1, whose place d1 then takes; by rows z2 too, in that of d2.
      const int64_t count = streams && packed.mix_rows != nullptr ? wide : half();
      if (const char* error = features(x, d, count); error != nullptr) return error;
    }
    const auto fill = [&](KeptStage<T>& s) {
      s.state = state_at(state);
      s.g1 = channels_of(grad, 0, c);
      s.d2 = d2;
    };
    const char* error = kept_stages<true>(around(with_taps ? 2 : 1), [&](KeptStage<T>& s) {
      fill(s);
      s.subnets[0] = packed.rho;
      s.subnets[1] = packed.eta;
      s.g2 = channels_of(grad, c, c);
      if (with_taps) s.z1 = d;
    });
    if (error != nullptr) return error;
    error = kept_stages<false>(around(with_taps ? 1 : 0), [&](KeptStage<T>& s) {
      fill(s);
      s.subnets[0] = packed.phi;
      if (with_d1) s.d1 = d;
      if (!with_taps) {
        s.mix_transposed = packed.mix_transposed;
        s.grad_x = channels_of(grad_x, 0, shape.inputs);
      }
    });
    return error == nullptr && with_taps ? unmix(d, grad_x) : error;
  }
  template <bool kOuter, class Fill>
  const char* kept_stages(const Rows& rows, const Fill& fill) const {
    if (streams) {
      KeptStage<T> s{};
      s.tiling = tiling(1, rows);
      s.activation = shape.activation;
      s.clamp = shape.clamp;
      fill(s);
      return launch_kept_rows<T, kOuter>(s, packed.mix_rows_transposed, half(), packed.rows_once,
                                         stream);
    }
    switch (half()) {
      case 32:
        return kept_stage<KeptSizes<T, kOuter, 32, 8, 2, 16, 4>>(rows, fill);
      case 64:
        // With 3 blocks to a multiprocessor two registers of float32's phi are spilled.
        return kept_stage<KeptSizes<T, kOuter, 64, 8, 2, 16, kOuter || sizeof(T) == 2 ? 3 : 2>>(
            rows, fill);
      default:
        return kept_stage<KeptSizes<T, kOuter, 128, 4, 1, 16, 2>>(rows, fill);
    }
  }
  template <class Z, class Fill>
  const char* kept_stage(const Rows& rows, const Fill& fill) const {
    KeptStage<T> s{};
    s.tiling = tiling(Z::kRows, rows);
    s.hidden = static_cast<int>(shape.channels);
    s.activation = shape.activation;
    s.clamp = shape.clamp;
    fill(s);
    return launch(cuda::kept_stage<T, Z>, {s.tiling.count(), Z::kThreads, Z::kBytes}, stream, s);
  }
};

// Calls f(run, first image, pieces) for groups of images in turn. T is the type of the features; x
// has the size of all images.
template <class T, class X, class F>
const char* in_parts(const CouplingShape& shape, const PackedWeights& packed, const Image<X>& x,
                     Direction direction, const Pieces& pieces, Stream stream, const F& f) {
  if (x.batch * x.height * x.width == 0) return nullptr;
  Gpu gpu;
  if (const char* error = current_gpu(gpu); error != nullptr) return error;
  bool streams = direction == Direction::kept_rows;
  const char* error = nullptr;
  if (!streams && direction != Direction::kept) {
    error = streams_rows(shape, padded_half(shape), gpu, streams);
  }
  const Parts parts(shape, x.batch, x.height, x.width, sizeof(T), direction);
  for (int64_t first = 0; first < x.batch && error == nullptr; first += parts.images) {
    const int64_t count = parts.images < x.batch - first ? parts.images : x.batch - first;
    for (int64_t row = 0; row < x.height && error == nullptr; row += parts.rows) {
      const int64_t end = row + parts.rows < x.height ? row + parts.rows : x.height;
      const Rows result{static_cast<int>(row), static_cast<int>(end)};
      error = f(PartialCall<T>{shape, packed, count, x.height, x.width, gpu.shared_bytes, streams,
                       result, result.wider(halo_of(shape, direction), x.height), stream},
                first, pieces);
    }
  }
  return error;
}

template <class T>
int64_t feature_bytes(const CouplingShape& shape, int64_t batch, int64_t height, int64_t width,
                      Direction direction) {
  const Parts parts(shape, batch, height, width, sizeof(T), direction);
  return parts.images * parts.kept_rows * width * bytes_of_pixel(shape, sizeof(T), direction);
}

template <class T>
PackedWeights packed_weights(const CouplingBlock& block) {
  Pieces pieces(block.packed);
  Packing packing{};
  return lay_out<T>(block.shape, block.weights, false, pieces, packing, block.precision);
}

// The part of the state, if there is one, from an image on.
template <class T, class Byte>
CouplingState<Byte> state_from(CouplingState<Byte> state, const CouplingShape& shape,
                               const Image<T>& x, int64_t first) {
  if (state.data != nullptr) {
    state.data += first * x.pixels() * state_bytes(padded_half(shape), sizeof(T), shape.kernel);
  }
  return state;
}

}  // namespace

int64_t coupling_feature_bytes = 0;

template <class T>
int64_t coupling_packed_bytes(const CouplingShape& shape) {
  return packed_bytes<T>(shape, false);
}
template <class T>
const char* coupling_pack(const CouplingShape& shape, const float* weights, void* packed,
                          Stream stream) {
  return pack<T>(shape, weights, false, packed, stream);
}

template <class T>
int64_t coupling_state_bytes(const CouplingShape& shape) {
  if (shape.activation == Activation::softplus) return 0;
  return state_bytes(padded_half(shape), sizeof(T), shape.kernel);
}

template <class T>
int64_t coupling_workspace_bytes(const CouplingShape& shape, const Image<T>& x) {
  return feature_bytes<T>(shape, x.batch, x.height, x.width, Direction::forward);
}
template <class T>
const char* coupling(const CouplingBlock& block, const Image<T>& x, const MutableImage<T>& y,
                     const CouplingState<unsigned char>& state, void* workspace, Stream stream) {
  return in_parts<T>(block.shape, packed_weights<T>(block), x, Direction::forward,
                     Pieces(workspace), stream,
                     [&](const PartialCall<T>& run, int64_t first, const Pieces& pieces) {
                       return run.value(part_of(x, first, run.batch), part_of(y, first, run.batch),
                                        state_from(state, block.shape, x, first), pieces);
                     });
}

template <class T>
int64_t coupling_backward_workspace_bytes(const CouplingShape& shape, const Image<T>& x,
                                          bool with_state) {
  return feature_bytes<T>(shape, x.batch, x.height, x.width,
                          direction_back(shape, x.height, x.width, with_state));
}
template <class T>
const char* coupling_backward(const CouplingBlock& block, const Image<T>& grad, const Image<T>& x,
                              const CouplingState<const unsigned char>& state,
                              const MutableImage<T>& grad_x, void* workspace, Stream stream) {
  const Direction direction = direction_back(block.shape, x.height, x.width, state.exists);
  return in_parts<T>(
      block.shape, packed_weights<T>(block), x, direction, Pieces(workspace), stream,
      [&](const PartialCall<T>& run, int64_t first, const Pieces& pieces) {
        const Image<T> of_grad = part_of(grad, first, run.batch);
        const Image<T> of_x = part_of(x, first, run.batch);
        const MutableImage<T> to = part_of(grad_x, first, run.batch);
        if (!state.exists) return run.gradient(of_grad, of_x, to, pieces);
        return run.gradient(of_grad, of_x, state_from(state, block.shape, x, first), to, pieces);
      });
}

template <class T>
int64_t coupling_inverse_workspace_bytes(const CouplingShape& shape, const Image<T>& y) {
  return packed_bytes<float>(shape, true) +
         feature_bytes<float>(shape, y.batch, y.height, y.width, Direction::inverse);
}
template <class T>
const char* coupling_inverse(const CouplingShape& shape, const Image<T>& y, const float* weights,
                             const MutableImage<T>& x, void* workspace, Stream stream) {
  if (y.batch * y.pixels() == 0) return nullptr;
  const char* error = pack<float>(shape, weights, true, workspace, stream);
  if (error != nullptr) return error;
  Pieces pieces(workspace);
  Packing packing{};
  const PackedWeights packed = lay_out<float>(shape, weights, true, pieces, packing);
  return in_parts<float>(shape, packed, y, Direction::inverse, pieces, stream,
                         [&](const PartialCall<float>& run, int64_t first, const Pieces& rest) {
                           return run.inverse(part_of(y, first, run.batch),
                                              part_of(x, first, run.batch), rest);
                         });
}

#define MGHF_INSTANTIATE(T)                                                                    \
  template int64_t coupling_packed_bytes<T>(const CouplingShape&);                             \
  template const char* coupling_pack<T>(const CouplingShape&, const float*, void*, Stream);    \
  template int64_t coupling_state_bytes<T>(const CouplingShape&);                              \
  template int64_t coupling_workspace_bytes(const CouplingShape&, const Image<T>&);            \
  template const char* coupling(const CouplingBlock&, const Image<T>&, const MutableImage<T>&, \
                                const CouplingState<unsigned char>&, void*, Stream);           \
  template int64_t coupling_backward_workspace_bytes(const CouplingShape&, const Image<T>&,    \
                                                     bool);                                    \
  template const char* coupling_backward(const CouplingBlock&, const Image<T>&,                \
                                         const Image<T>&,                                      \
                                         const CouplingState<const unsigned char>&,            \
                                         const MutableImage<T>&, void*, Stream);               \
  template int64_t coupling_inverse_workspace_bytes(const CouplingShape&, const Image<T>&);    \
  template const char* coupling_inverse(const CouplingShape&, const Image<T>&, const float*,   \
                                        const MutableImage<T>&, void*, Stream);
MGHF_INSTANTIATE(float)
MGHF_INSTANTIATE(Half)
MGHF_INSTANTIATE(BFloat16)
#undef MGHF_INSTANTIATE

}  // namespace mghf::cuda
