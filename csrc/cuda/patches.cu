// The strided patch projection and its gradients.
//
//     h = relu(W1 patch + b1)      y = W2 h + b2      embedding e = y / (|y| + 1e-7)
//     d_y = (d_e - e <d_e, e> (1 + 1e-7 / |y|)) / (|y| + 1e-7)      d_h = (W2^T d_y) [h > 0]
//     d_x: every pixel sums W1^T d_h over the patches that cover it
//     d_W1 = sum d_h patch^T      d_b1 = sum d_h      d_W2 = sum d_y h^T      d_b2 = sum d_y
//
// All of them are matrix products by tensor cores, whose rows are the pairs of a patch (or of a
// cell of the image, see patches_image.h) and a map. Maps run fastest among the rows if they do in
// the image, otherwise patches do, so that copies are contiguous. No patch is ever copied in global
// memory. |y| and the bits h > 0 come from the forward's state. The forward has two kernels: that
// of patches_rows.h, and where that does not apply that of patches_forward.h.
//
// Sizes in the predictions: B = 1, C = 128 maps of 512 x 512, N = 441 patches of K = 1024 pixels,
// 128 hidden units, D = 64: R = 56,448 rows; on an H200 with 4.3 TB/s, 300 TFLOP/s of TF32 and 600
// of bfloat16 by mma.sync.
#include "patches.h"

#include "patches_forward.h"
#include "patches_hidden.h"
#include "patches_image.h"
#include "patches_rows.h"
#include "patches_weights.h"
#include "variants.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether every vector that is copied is contiguous and aligned.
template <class T>
bool wide(const Image<T>& x, const Patches& p) {
  constexpr int64_t kWide = 16 / static_cast<int64_t>(sizeof(T));
  const auto fits = [](int64_t size) { return size % kWide == 0; };
  if (!aligned(x.data) || !fits(x.batch_stride) || !fits(x.row_stride)) return false;
  return p.maps_fastest ? x.channel_stride == 1 && fits(p.channels) && fits(x.column_stride)
                        : x.column_stride == 1 && fits(p.size) && fits(p.stride) &&
                              fits(x.channel_stride);
}

// Whether two pixels of a row, from an even column on, are contiguous and aligned.
template <class T>
bool in_twos(const MutableImage<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (2 * sizeof(T)) == 0 && x.column_stride == 1 &&
         (x.row_stride | x.channel_stride | x.batch_stride | x.width) % 2 == 0;
}

// A layer's weights as a factor. The depth is that of the inputs or, if `back`, of the outputs.
Factor factor_of(const float* weight, int64_t outputs, int64_t inputs, bool back, Pieces& pieces) {
  Factor factor = back ? Factor(weight, inputs, outputs, 1, inputs)
                       : Factor(weight, outputs, inputs, inputs, 1);
  factor.to = pieces.take<uint4>(factor.size());
  return factor;
}

// The weights as `project` and as `project_rows` take them.
struct ProjectionMemory {
  Factor weight1, weight2;
  RowsWeights rows;

  ProjectionMemory(const Projection& p, Pieces& pieces)
      : weight1(factor_of(p.weight1, p.hidden, p.pixels(), false, pieces)),
        weight2(factor_of(p.weight2, p.dimension, p.hidden, false, pieces)),
        rows(p.pixels(), pieces) {}
};

// How many steps of 16 pixels a row of a patch has for `project_rows`, or 0 where `project` takes
// the image: the rows of an image are copied in pieces that are contiguous and aligned, and a block
// has all columns of both layers.
template <class T>
int steps_of_rows(const Image<T>& x, const Patches& p) {
  const bool takes = std::is_same_v<T, float> && (p.size == 16 || p.size == 32) &&
                     p.stride <= p.size && !p.maps_fastest && wide(x, p) && p.hidden <= kUnits &&
                     p.dimension <= kOutputs;
  return takes && newest(Variant::patches) ? p.size / kHalvesOfStep : 0;
}

// Sets `done` unless the device has no products of warpgroups or too little memory for a block.
template <int kSteps>
const char* run_rows(const Image<float>& x, const Patches& p, const Projection& projection,
                     const RowsWeights& weights, float* embedding, int* state, Stream stream,
                     bool& done) {
  Gpu gpu{};
  bool has_products = false;
  const char* error = has_warpgroup_products(has_products);
  if (error == nullptr) error = current_gpu(gpu);
  const int64_t stages = stages_within<kSteps>(gpu.shared_bytes);
  if (error != nullptr || !has_products || stages < 2) return error;
  done = true;
  error = launch(pack_halves, {kPackBlocks, kThreads}, stream, weights, projection.weight1,
                 projection.weight2, p.pixels(), p.hidden, p.dimension);
  if (error != nullptr) return error;
  const auto bytes = static_cast<size_t>(stages * Stage<kSteps>::kBytes + weights.second_bytes());
  return launch(project_rows<kSteps>, {up(p.number(), kRows), kRowsThreads, bytes}, stream, x, p,
                weights, projection.bias1, projection.bias2, embedding, state,
                static_cast<int>(stages));
}

template <class T>
const char* run_project(const Image<T>& x, const Projection& projection,
                        const ProjectionMemory& memory, float* embedding, int* state,
                        float* hidden_layer, Stream stream) {
  const Patches p(x, projection);
  if (p.number() == 0) return nullptr;
  if constexpr (std::is_same_v<T, float>) {
    const int steps = hidden_layer == nullptr ? steps_of_rows(x, p) : 0;
    bool done = false;
    const char* error = nullptr;
    if (steps > 0) {
      error = (steps == 1 ? run_rows<1> : run_rows<2>)(x, p, projection, memory.rows, embedding,
                                                       state, stream, done);
    }
    if (error != nullptr || done) return error;
  }
  const char* const error =
      launch(pack, {up(memory.weight1.size() + memory.weight2.size(), kThreads), kThreads}, stream,
             memory.weight1, memory.weight2);
  if (error != nullptr) return error;
  const auto run = [&](auto kernel, int bytes) {
    return launch(kernel, {up(p.number(), kRows), kThreads, static_cast<size_t>(bytes)}, stream, x,
                  p, memory.weight1, projection.bias1, memory.weight2, projection.bias2, embedding,
                  state, hidden_layer);
  };
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (p.maps_fastest) {
    return run(wide(x, p) ? project<T, true, kWide> : project<T, true, 1>,
               project_bytes<T, true>());
  }
  return run(wide(x, p) ? project<T, false, kWide> : project<T, false, 1>,
             project_bytes<T, false>());
}

struct ImageGradientMemory {
  uint4 *grad_hidden, *weights;
  Factor weight2;

  ImageGradientMemory(const Projection& p, int64_t patches, Pieces& pieces) {
    const int64_t of_row = pieces_of(static_cast<int>(p.hidden));
    grad_hidden = pieces.take<uint4>(patches * of_row);
    weights = pieces.take<uint4>(of_row * p.pixels());
    weight2 = factor_of(p.weight2, p.dimension, p.hidden, true, pieces);
  }
};

struct WeightGradientMemory {
  float *hidden, *grad_hidden, *grad_output, *partial1, *partial2;
  ProjectionMemory projection;
  Factor weight2;

  WeightGradientMemory(const Projection& p, int64_t patches, Pieces& pieces)
      : projection(p, pieces), weight2(factor_of(p.weight2, p.dimension, p.hidden, true, pieces)) {
    const OuterProduct first(patches, p.hidden, p.pixels());
    const OuterProduct second(patches, p.dimension, p.hidden);
    hidden = pieces.take<float>(patches * p.hidden);
    grad_hidden = pieces.take<float>(patches * p.hidden);
    grad_output = pieces.take<float>(patches * p.dimension);
    partial1 = pieces.take<float>(first.splits * first.size());
    partial2 = pieces.take<float>(second.splits * second.size());
  }
};

template <class T, bool kImplicit>
const char* run_outer_product(const Image<T>& x, const Patches& p, const OuterProduct& o,
                              const float* left, const float* right, float* partial, float* weight,
                              float* bias, Stream stream) {
  const char* const error =
      launch(outer_product<T, kImplicit>, {o.splits * o.tiles(), kOuterThreads}, stream, x, p, o,
             left, right, partial);
  if (error != nullptr) return error;
  return launch(add_splits, {up(o.size(), kThreads), kThreads}, stream, o,
                static_cast<const float*>(partial), weight, bias);
}

}  // namespace

int64_t patches_workspace_bytes(const Projection& projection) {
  Pieces pieces;
  ProjectionMemory(projection, pieces);
  return pieces.bytes();
}

template <class T>
const char* patches(const Image<T>& x, const Projection& projection, float* embedding, int* state,
                    void* workspace, Stream stream) {
  Pieces pieces{static_cast<char*>(workspace)};
  const ProjectionMemory memory(projection, pieces);
  return run_project(x, projection, memory, embedding, state, nullptr, stream);
}

int64_t patches_backward_workspace_bytes(const Projection& projection, int64_t maps, int64_t height,
                                         int64_t width) {
  Pieces pieces;
  ImageGradientMemory(projection, maps * projection.patches(height, width), pieces);
  return pieces.bytes();
}

template <class T>
const char* patches_backward(const MutableImage<T>& grad_x, bool add, const Projection& projection,
                             const EmbeddingGradient& gradient, void* workspace, Stream stream) {
  const Patches p(grad_x, projection);
  if (p.maps == 0) return nullptr;
  const Regions regions(p, grad_x.height, grad_x.width);
  Pieces pieces{static_cast<char*>(workspace)};
  const ImageGradientMemory memory(projection, p.number(), pieces);
  const int64_t weights =
      static_cast<int64_t>(pieces_of(p.hidden)) * p.pixels() * 2 + memory.weight2.size();
  const char* error = launch(pack_for_gradient, {up(weights, kThreads), kThreads}, stream, p,
                             projection.weight1, reinterpret_cast<uint32_t*>(memory.weights),
                             memory.weight2);
  if (error != nullptr) return error;
  error = launch(hidden_gradient<true>, {up(p.number(), kRows), kThreads}, stream, p, gradient,
                 memory.weight2, reinterpret_cast<uint32_t*>(memory.grad_hidden), nullptr, nullptr);
  if (error != nullptr) return error;
  return launch(image_gradient<T>,
                {up(p.maps * regions.cells(), kRows) * regions.tiles, kThreads,
                 2 * kSliceSize * sizeof(uint4)},
                stream, grad_x, p, regions, static_cast<const uint4*>(memory.grad_hidden),
                static_cast<const uint4*>(memory.weights),
                regions.even(p) && in_twos(grad_x), add);
}

int64_t patches_backward_weights_workspace_bytes(const Projection& projection, int64_t maps,
                                                 int64_t height, int64_t width) {
  Pieces pieces;
  WeightGradientMemory(projection, maps * projection.patches(height, width), pieces);
  return pieces.bytes();
}

template <class T>
const char* patches_backward_weights(const Image<T>& x, const Projection& projection,
                                     const EmbeddingGradient& gradient,
                                     const ParameterGradients& result, void* workspace,
                                     Stream stream) {
  const Patches p(x, projection);
  Pieces pieces{static_cast<char*>(workspace)};
  const WeightGradientMemory memory(projection, p.number(), pieces);
  const char* error =
      run_project(x, projection, memory.projection, nullptr, nullptr, memory.hidden, stream);
  if (error != nullptr) return error;
  error = launch(pack, {up(memory.weight2.size(), kThreads), kThreads}, stream, memory.weight2,
                 Factor{});
  if (error != nullptr) return error;
  error = launch(hidden_gradient<false>, {up(p.number(), kRows), kThreads}, stream, p, gradient,
                 memory.weight2, nullptr, memory.grad_hidden, memory.grad_output);
  if (error != nullptr) return error;
  error = run_outer_product<T, true>(x, p, {p.number(), p.hidden, p.pixels()}, memory.grad_hidden,
                                     nullptr, memory.partial1, result.weight1, result.bias1,
                                     stream);
  if (error != nullptr) return error;
  return run_outer_product<T, false>(x, p, {p.number(), p.dimension, p.hidden},
                                     memory.grad_output, memory.hidden, memory.partial2,
                                     result.weight2, result.bias2, stream);
}

#define MGHF_PATCHES_OF(T)                                                                       \
  template const char* patches(const Image<T>&, const Projection&, float*, int*, void*, Stream); \
  template const char* patches_backward(const MutableImage<T>&, bool, const Projection&,        \
                                        const EmbeddingGradient&, void*, Stream);               \
  template const char* patches_backward_weights(const Image<T>&, const Projection&,             \
                                                const EmbeddingGradient&,                       \
                                                const ParameterGradients&, void*, Stream)
MGHF_PATCHES_OF(float);
MGHF_PATCHES_OF(Half);
MGHF_PATCHES_OF(BFloat16);

}  // namespace mghf::cuda
