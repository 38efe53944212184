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
// memory. |y| and the bits h > 0 come from the forward's state.
// On a device with products of warpgroups there are newer kernels for images of contiguous rows, of
// patches_rows.h and patches_rows_image.h; where they do not apply, those of patches_forward.h and
// patches_image.h run.
//
// Sizes in the predictions: B = 1, C = 128 maps of 512 x 512, N = 441 patches of K = 1024 pixels,
// 128 hidden units, D = 64: R = 56,448 rows; on an H200 with 4.3 TB/s, 300 TFLOP/s of TF32 and 600
// of bfloat16 by mma.sync.
#include "patches.h"

#include <optional>

#include "patches_forward.h"
#include "patches_hidden.h"
#include "patches_image.h"
#include "patches_rows.h"
#include "patches_rows_image.h"
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

// Whether `project_rows` takes the projection: a block has all columns of both layers.
bool sizes_for_rows(const Projection& p) {
  return (p.patch_size == 16 || p.patch_size == 32) && p.stride <= p.patch_size &&
         p.hidden <= kUnits && p.dimension <= kOutputs;
}

// The weights as the forward's kernels take them, in a workspace or in what patches_pack() writes.
struct ProjectionMemory {
  Factor weight1, weight2;
  RowsWeights rows;

  ProjectionMemory(const Projection& p, Pieces& pieces)
      : weight1(factor_of(p.weight1, p.hidden, p.pixels(), false, pieces)),
        weight2(factor_of(p.weight2, p.dimension, p.hidden, false, pieces)),
        rows(sizes_for_rows(p) ? p.pixels() : 0, pieces) {}
};

// How many steps of 16 pixels a row of a patch has for `project_rows`, or 0 where `project` takes
// the image: the former copies pieces of an image's rows, contiguous and aligned.
template <class T>
int steps_of_rows(const Image<T>& x, const Projection& projection, const Patches& p) {
  const bool takes = sizes_for_rows(projection) && !p.maps_fastest && wide(x, p) &&
                     newest(Variant::patches);
  return takes ? p.size / kHalvesOfStep : 0;
}

const char* pack_for_project(const ProjectionMemory& memory, Stream stream) {
  return launch(pack, {up(memory.weight1.size() + memory.weight2.size(), kThreads), kThreads},
                stream, memory.weight1, memory.weight2);
}

const char* pack_for_rows(const Projection& p, const RowsWeights& weights, Stream stream) {
  return launch(pack_halves, {kPackBlocks, kThreads}, stream, weights, p.weight1, p.weight2,
                static_cast<int>(p.pixels()), static_cast<int>(p.hidden),
                static_cast<int>(p.dimension));
}

// Whether the device has products of warpgroups, and the shared memory that a block may have.
const char* find_products(bool& has, int64_t& shared_bytes) {
  Gpu gpu{};
  const char* error = has_warpgroup_products(has);
  if (error == nullptr) error = current_gpu(gpu);
  shared_bytes = gpu.shared_bytes;
  return error;
}

// Sets `done` unless the device has no products of warpgroups or too little memory for a block.
template <class T, int kSteps, int kParts>
const char* run_rows(const Image<T>& x, const Patches& p, const Projection& projection,
                     const RowsWeights& weights, float* embedding, int* state, Stream stream,
                     bool& done) {
  int64_t shared_bytes = 0;
  bool has_products = false;
  const char* error = find_products(has_products, shared_bytes);
  const int64_t stages = stages_within<T, kSteps, kParts>(shared_bytes);
  if (error != nullptr || !has_products || stages < 2) return error;
  done = true;
  if (!projection.is_packed) error = pack_for_rows(projection, weights, stream);
  if (error != nullptr) return error;
  const auto bytes =
      static_cast<size_t>(stages * Stage<T, kSteps, kParts>::kBytes + weights.second_bytes(kParts));
  return launch(project_rows<T, kSteps, kParts>, {up(p.number(), kRows), kRowsThreads, bytes},
                stream, x, p, weights, projection.bias1, projection.bias2, embedding, state,
                static_cast<int>(stages));
}

// For patches of so many steps, in the precision that is asked for.
template <class T>
auto rows_kernel(int steps, const Projection& projection) {
  const bool once = projection.precision != Precision::float32;
  if (once) return steps == 1 ? run_rows<T, 1, 1> : run_rows<T, 2, 1>;
  return steps == 1 ? run_rows<T, 1, 2> : run_rows<T, 2, 2>;
}

template <class T>
const char* run_project(const Image<T>& x, const Projection& projection,
                        const ProjectionMemory& memory, float* embedding, int* state,
                        float* hidden_layer, Stream stream) {
  const Patches p(x, projection);
  if (p.number() == 0) return nullptr;
  const int steps = hidden_layer == nullptr ? steps_of_rows(x, projection, p) : 0;
  bool done = false;
  const char* error = nullptr;
  if (steps > 0) {
    error = rows_kernel<T>(steps, projection)(x, p, projection, memory.rows, embedding, state,
                                              stream, done);
  }
  if (error != nullptr || done) return error;
  if (!projection.is_packed) error = pack_for_project(memory, stream);
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

// The weights as the kernels of the image's gradient take them, likewise.
struct ImageGradientMemory {
  uint4* weights;
  Factor weight2;
  std::optional<GradientWeights> rows;

  ImageGradientMemory(const Projection& p, Pieces& pieces)
      : weights(pieces.take<uint4>(int64_t{pieces_of(static_cast<int>(p.hidden))} * p.pixels())),
        weight2(factor_of(p.weight2, p.dimension, p.hidden, true, pieces)) {
    if (sizes_for_rows(p)) rows.emplace(p, pieces);
  }
};

// All that is packed of a projection.
struct PackedProjection {
  ProjectionMemory forward;
  ImageGradientMemory backward;

  PackedProjection(const Projection& p, Pieces& pieces)
      : forward(p, pieces), backward(p, pieces) {}
};

PackedProjection packed_of(const Projection& projection) {
  Pieces pieces(projection.packed);
  return {projection, pieces};
}

const char* pack_for_image_gradient(const Projection& p, const ImageGradientMemory& memory,
                                    Stream stream) {
  const int64_t count = int64_t{2} * pieces_of(static_cast<int>(p.hidden)) * p.pixels();
  return launch(pack_for_gradient, {up(count + memory.weight2.size(), kThreads), kThreads}, stream,
                static_cast<int>(p.pixels()), static_cast<int>(p.hidden), p.weight1,
                reinterpret_cast<uint32_t*>(memory.weights), memory.weight2);
}

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

const char* pack_for_gradient_rows(const Projection& p, const GradientWeights& weights,
                                   Stream stream) {
  return launch(pack_halves_for_gradient, {weights.pack_blocks(), kThreads}, stream, weights,
                p.weight1, p.weight2, static_cast<int>(p.patch_size), static_cast<int>(p.stride),
                static_cast<int>(p.hidden), static_cast<int>(p.dimension));
}

// Sets `done` where the kernels of patches_rows_image.h take the image and the device has what they
// need.
template <class T, int kParts>
const char* run_gradient_rows(const MutableImage<T>& x, bool add, const Patches& p,
                              const Projection& projection, const EmbeddingGradient& gradient,
                              const GradientWeights& weights, const HiddenGradient& hidden,
                              Stream stream, bool& done) {
  const Regions regions(p.size, p.stride, x.height, x.width, kCellPixels);
  if (p.maps_fastest || !regions.even(p) || !in_twos(x) || !newest(Variant::patches)) {
    return nullptr;
  }
  int64_t shared_bytes = 0;
  bool has_products = false;
  const char* error = find_products(has_products, shared_bytes);
  const int64_t stages = gradient_stages_within(shared_bytes, regions, p.columns, kParts);
  if (error != nullptr || !has_products || stages < 2) return error;
  done = true;
  if (!projection.is_packed) error = pack_for_gradient_rows(projection, weights, stream);
  if (error != nullptr) return error;
  constexpr size_t kOfPatch = kParts * kWordsOfPart * sizeof(uint4);
  error = launch(hidden_gradient_rows<kParts>,
                 {up(p.number(), kRows), kHiddenThreads, size_t{weights.second_bytes(kParts)}},
                 stream, p, gradient, weights, hidden);
  if (error != nullptr) return error;
  const size_t bytes = static_cast<size_t>(stages) * weights.stage_bytes(kParts) +
                       static_cast<size_t>(most_patches(regions.terms, p.columns)) * kOfPatch;
  return launch(image_gradient_rows<T, kParts>,
                {up(p.maps * regions.cells(), kRows), kRowsThreads, bytes}, stream, x, p, regions,
                hidden, weights, add, static_cast<int>(stages));
}

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

// Memory for d_h, for either kind of kernels.
uint4* take_grad_hidden(const Projection& p, int64_t patches, Pieces& pieces) {
  Pieces of_rows;
  if (sizes_for_rows(p)) HiddenGradient(patches, of_rows);
  const int64_t words = patches * pieces_of(static_cast<int>(p.hidden));
  const int64_t words_of_rows = of_rows.bytes() / static_cast<int64_t>(sizeof(uint4));
  return pieces.take<uint4>(words > words_of_rows ? words : words_of_rows);
}

}  // namespace

int64_t patches_packed_bytes(const Projection& projection) {
  Pieces pieces;
  PackedProjection(projection, pieces);
  return pieces.bytes();
}

const char* patches_pack(const Projection& projection, Stream stream) {
  const PackedProjection packed = packed_of(projection);
  const char* error = pack_for_project(packed.forward, stream);
  if (error == nullptr && sizes_for_rows(projection)) {
    error = pack_for_rows(projection, packed.forward.rows, stream);
  }
  if (error == nullptr) error = pack_for_image_gradient(projection, packed.backward, stream);
  if (error == nullptr && sizes_for_rows(projection)) {
    error = pack_for_gradient_rows(projection, *packed.backward.rows, stream);
  }
  return error;
}

int64_t patches_workspace_bytes(const Projection& projection) {
  Pieces pieces;
  if (!projection.is_packed) ProjectionMemory(projection, pieces);
  return pieces.bytes();
}

template <class T>
const char* patches(const Image<T>& x, const Projection& projection, float* embedding, int* state,
                    void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const ProjectionMemory memory = projection.is_packed ? packed_of(projection).forward
                                                       : ProjectionMemory(projection, pieces);
  return run_project(x, projection, memory, embedding, state, nullptr, stream);
}

int64_t patches_backward_workspace_bytes(const Projection& projection, int64_t maps, int64_t height,
                                         int64_t width) {
  Pieces pieces;
  take_grad_hidden(projection, maps * projection.patches(height, width), pieces);
  if (!projection.is_packed) ImageGradientMemory(projection, pieces);
  return pieces.bytes();
}

template <class T>
const char* patches_backward(const MutableImage<T>& grad_x, bool add, const Projection& projection,
                             const EmbeddingGradient& gradient, void* workspace, Stream stream) {
  const Patches p(grad_x, projection);
  if (p.maps == 0) return nullptr;
  const Regions regions(p, grad_x.height, grad_x.width);
  Pieces pieces(workspace);
  // One after the other in the same memory.
  Pieces of_rows(workspace);
  const HiddenGradient hidden(p.number(), of_rows);
  uint4* const grad_hidden = take_grad_hidden(projection, p.number(), pieces);
  const ImageGradientMemory memory = projection.is_packed
                                         ? packed_of(projection).backward
                                         : ImageGradientMemory(projection, pieces);
  const char* error = nullptr;
  bool done = false;
  if (memory.rows) {
    const bool once = projection.precision != Precision::float32;
    error = (once ? run_gradient_rows<T, 1> : run_gradient_rows<T, 2>)(
        grad_x, add, p, projection, gradient, *memory.rows, hidden, stream, done);
  }
  if (error != nullptr || done) return error;
  if (!projection.is_packed) error = pack_for_image_gradient(projection, memory, stream);
  if (error != nullptr) return error;
  error = launch(hidden_gradient<true>, {up(p.number(), kRows), kThreads}, stream, p, gradient,
                 memory.weight2, reinterpret_cast<uint32_t*>(grad_hidden), nullptr, nullptr);
  if (error != nullptr) return error;
  return launch(image_gradient<T>,
                {up(p.maps * regions.cells(), kRows) * regions.tiles, kThreads,
                 2 * kSliceSize * sizeof(uint4)},
                stream, grad_x, p, regions, static_cast<const uint4*>(grad_hidden),
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
  Pieces pieces(workspace);
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
