// The gradients of the block's weights. With the names of coupling.cu and, of a sub-network S(f) =
// P A(D A(E f)) with the gradient g, the gradients at its layers
//
//     g2 = A' P^T g,   g1 = A' D^T g2
//
// those of its weights are sums over the pixels: g1 f^T for E, g2 times A(E f) at each tap for D,
// g A(D ...)^T for P; and (d1, d2) x^T for the mix, under each tap of its window.
//
// Training an extractor is rare, so this is simple: every layer is in memory, float32, some rows of
// one image at a time (a band, with as many rows on either side as the 3x3 layers reach), and is
// computed by a kernel of its own. A sum over a band's pixels is computed in parts, which are added
// to earlier bands' in float64 and in order.
//
// Predicted for B = 1, C = 128, 512 x 512, a 1x1 mix: 65,536 multiply-adds a pixel for the layers,
// 49,152 for their gradients and 65,536 for the weights, each by three products of TF32: 283 GFLOP
// in all, 0.95 ms at 300 TFLOP/s, halos 1.13 times that. These kernels copy without prefetching
// and read layers of 3.6 KB a pixel some three times, 2.8 GB, 0.7 ms at 4.3 TB/s: 4 to 6 ms are
// expected.
#include "coupling_weights.h"

#include "coupling_layers.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

constexpr int kReach = 4;            // of the 3x3 layers: rows on either side of those that count
constexpr int64_t kLeastRows = 8;    // that count
constexpr int64_t kLeastRun = 512;   // pixels of a part
constexpr int64_t kMostParts = 128;

// Sizes that do not depend on the type of the image.
struct Sizes {
  int64_t count, half, terms;         // of weights; c; products for a pixel of the mix
  int64_t rows, kept_rows, run, parts;

  Sizes(const CouplingShape& s, int64_t height, int64_t width)
      : count(coupling_weight_count(s)),
        half(s.channels / 2),
        terms(s.inputs * s.kernel * s.kernel) {
    const int64_t of_row = floats_of_pixel() * width * static_cast<int64_t>(sizeof(float));
    const int64_t fitting = of_row > 0 ? coupling_layer_bytes / of_row - 2 * kReach : height;
    rows = fitting > kLeastRows ? fitting : kLeastRows;
    rows = rows < height ? rows : height;
    kept_rows = rows + 2 * kReach < height ? rows + 2 * kReach : height;
    const int64_t pixels = rows * width, wanted = (pixels + kMostParts - 1) / kMostParts;
    run = wanted > kLeastRun ? wanted : kLeastRun;
    parts = (pixels + run - 1) / run;
  }
  // Layers z, d, A(E f), A(D ...), g2 and g1 of C channels each, and two of c.
  int64_t floats_of_pixel() const { return 7 * 2 * half; }
};

struct Space {
  double* totals;
  float* partial;
  Layer z, d, hidden, second, grad_second, grad_hidden, rho, g1;

  Space(const Sizes& sizes, int64_t width, Pieces& pieces)
      : totals(pieces.take<double>(sizes.count)),
        partial(pieces.take<float>(sizes.parts * sizes.count)) {
    const int64_t pixels = sizes.kept_rows * width;
    const auto take = [&](int64_t channels) {
      return Layer{pieces.take<float>(pixels * channels), static_cast<int>(channels)};
    };
    for (Layer* layer : {&z, &d, &hidden, &second, &grad_second, &grad_hidden}) {
      *layer = take(2 * sizes.half);
    }
    rho = take(sizes.half);
    g1 = take(sizes.half);
  }
};

// A sub-network's weights, and the place of its gradients among all weights'.
struct Subnet {
  const float *expand, *taps, *project;
  int64_t at_expand, at_taps, at_project;

  Subnet(const float* weights, const Sizes& s, const CouplingShape& shape, int number) {
    const int64_t c = s.half;
    at_expand = shape.channels * (s.terms + 1) + number * (4 * c * c + 18 * c);
    at_taps = at_expand + 2 * c * c;
    at_project = at_taps + 18 * c;
    expand = weights + at_expand;
    taps = weights + at_taps;
    project = weights + at_project;
  }
};

// The work on one band. The first error stops it.
template <class T>
struct Work {
  const CouplingShape& shape;
  const Sizes& sizes;
  const Space& space;
  Band band;
  int64_t b;
  Stream stream;
  const char* error = nullptr;

  int c() const { return static_cast<int>(sizes.half); }
  int64_t parts() const { return (band.count() + sizes.run - 1) / sizes.run; }

  template <class Kernel, class... Arguments>
  void start(Kernel kernel, int64_t threads, Arguments... arguments) {
    if (error != nullptr) return;
    const Grid grid{(threads + kLayerThreads - 1) / kLayerThreads, kLayerThreads};
    error = launch(kernel, grid, stream, arguments...);
  }
  template <class Left, class Right, class To>
  void product(const Left& left, const Right& right, const To& to, int64_t rows, int64_t columns,
               int64_t depth, int64_t run, int64_t number_of_parts) {
    const int64_t tiles = ((rows + kBlockSide - 1) / kBlockSide) *
                          ((columns + kBlockSide - 1) / kBlockSide);
    start(multiply<Left, Right, To>, tiles * number_of_parts * kLayerThreads, left, right, to,
          rows, columns, depth, run);
  }

  // A layer from another one: to = finish(W from), W with so many rows and columns.
  void layer(const Layer& from, const OfWeights& weights, int64_t rows, int64_t columns,
             const Layer& to, Finish finish, const Layer& values = {}) {
    product(OfPixels{from}, weights, IntoLayer{to, finish, shape.activation, nullptr, values},
            band.pixels(), rows, columns, columns, 1);
  }
  IntoPart part(int64_t place, int64_t width) const {
    return {space.partial + place, sizes.count, width};
  }
  // The gradient of a matrix of weights: grad from^T, summed over the pixels that count.
  template <class From>
  void sum(const Layer& grad, int64_t rows, const From& from, int64_t columns, int64_t place) {
    product(OfChannels{grad, band.first_counted()}, from, part(place, columns), rows, columns,
            band.count(), sizes.run, parts());
  }
  OfChannels channels_of(const Layer& layer) const { return {layer, band.first_counted()}; }

  static Layer from_channel(const Layer& layer, int channel) {
    return {layer.data + channel, layer.width};
  }

  // Both hidden layers of a sub-network.
  void go_through(const Subnet& s, const Layer& features) {
    const int64_t half = sizes.half, wide = 2 * half;
    layer(features, {s.expand, half, 1}, wide, half, space.hidden, Finish::activate);
    start(depthwise_layer, band.pixels() * wide, space.hidden, space.second, s.taps, 2 * c(), band,
          shape.activation);
  }
  void project(const Subnet& s, const Layer& to, Finish finish) {
    layer(space.second, {s.project, 2 * sizes.half, 1}, sizes.half, 2 * sizes.half, to, finish);
  }
  // The gradients of the weights of the sub-network that go_through() went through last, for that
  // of its value; adds that of its features to `to`.
  void go_back(const Subnet& s, const Layer& grad, const Layer& features, const Layer& to) {
    const int64_t half = sizes.half, wide = 2 * half;
    sum(grad, half, channels_of(space.second), wide, s.at_project);
    layer(grad, {s.project, 1, wide}, wide, half, space.grad_second, Finish::slope, space.second);
    start(sum_taps, parts() * wide * 9, space.grad_second, space.hidden, part(s.at_taps, 9),
          2 * c(), band, sizes.run, static_cast<int>(parts()));
    start(depthwise_transposed, band.pixels() * wide, space.grad_second, space.hidden,
          space.grad_hidden, s.taps, 2 * c(), band, shape.activation);
    sum(space.grad_hidden, wide, channels_of(features), half, s.at_expand);
    layer(space.grad_hidden, {s.expand, 1, half}, half, wide, to, Finish::add);
  }

  const char* run(const Image<T>& grad, const Image<T>& x, const float* weights) {
    const Subnet phi(weights, sizes, shape, 0), rho(weights, sizes, shape, 1),
        eta(weights, sizes, shape, 2);
    const int64_t mix_size = shape.channels * sizes.terms;
    const Layer z1 = space.z, z2 = from_channel(z1, c());
    const Layer d1 = space.d, d2 = from_channel(d1, c());
    const Window<T> window{x, b, band, static_cast<int>(shape.kernel)};
    product(WindowOfPixels<T>{window}, OfWeights{weights, sizes.terms, 1},
            IntoLayer{z1, Finish::store, shape.activation, weights + mix_size, {}}, band.pixels(),
            shape.channels, sizes.terms, sizes.terms, 1);
    go_through(phi, z1);
    project(phi, z2, Finish::add);
    go_through(rho, z2);
    project(rho, space.rho, Finish::store);
    start(enter<T>, band.pixels() * sizes.half, grad, b, band, z1, space.rho, space.g1, d1, c(),
          shape.clamp);
    go_back(rho, space.rho, z2, d2);
    go_through(eta, z2);
    go_back(eta, space.g1, z2, d2);
    go_through(phi, z1);
    go_back(phi, d2, z1, d1);
    sum(d1, shape.channels, WindowOfTerms<T>{window, band.first_counted()}, sizes.terms, 0);
    start(sum_channels, parts() * shape.channels, d1, part(mix_size, 0),
          static_cast<int>(shape.channels), band, sizes.run, static_cast<int>(parts()));
    return error;
  }
};

}  // namespace

int64_t coupling_layer_bytes = int64_t{128} << 20;

template <class T>
int64_t coupling_weights_workspace_bytes(const CouplingShape& shape, const Image<T>& x) {
  const Sizes sizes(shape, x.height, x.width);
  Pieces pieces;
  const Space space(sizes, x.width, pieces);
  return pieces.bytes();
}

template <class T>
const char* coupling_weights(const CouplingShape& shape, const Image<T>& grad, const Image<T>& x,
                             const float* weights, float* grad_weights, void* workspace,
                             Stream stream) {
  const Sizes sizes(shape, x.height, x.width);
  Pieces pieces(workspace);
  const Space space(sizes, x.width, pieces);
  const char* error = nullptr;
  for (int64_t b = 0; b < x.batch; ++b) {
    for (int64_t row = 0; row < x.height && error == nullptr; row += sizes.rows) {
      const int64_t end = row + sizes.rows < x.height ? row + sizes.rows : x.height;
      const int64_t first = row > kReach ? row - kReach : 0;
      const int64_t last = end + kReach < x.height ? end + kReach : x.height;
      const Band band{static_cast<int>(x.height),    static_cast<int>(x.width),
                      static_cast<int>(first),       static_cast<int>(last - first),
                      static_cast<int>(row),         static_cast<int>(end - row)};
      Work<T> work{shape, sizes, space, band, b, stream};
      error = work.run(grad, x, weights);
      if (error != nullptr) return error;
      const Grid grid{(sizes.count + kLayerThreads - 1) / kLayerThreads, kLayerThreads};
      error = launch(add_parts, grid, stream, space.partial, static_cast<int>(work.parts()),
                     sizes.count, b == 0 && row == 0, b + 1 == x.batch && end == x.height,
                     space.totals, grad_weights);
    }
  }
  return error;
}

#define MGHF_INSTANTIATE(T)                                                                   \
  template int64_t coupling_weights_workspace_bytes(const CouplingShape&, const Image<T>&);   \
  template const char* coupling_weights(const CouplingShape&, const Image<T>&,                \
                                        const Image<T>&, const float*, float*, void*, Stream);
MGHF_INSTANTIATE(float)
MGHF_INSTANTIATE(Half)
MGHF_INSTANTIATE(BFloat16)
#undef MGHF_INSTANTIATE

}  // namespace mghf::cuda
