// The strided patch projection and its gradients, on the CPU. See mghf_fast/reference/patches.py
// for the mathematics.
//
// Method. A vector's lanes are maps, of which a task takes one group; weights are scalars that all
// lanes share. The inner loops are register blocks of kUnits outputs x kPatches neighbouring
// patches. A few rows of the pixels under these patches are copied into [pixel][map], which fits
// the L1 cache, and meet all hidden units before the next rows come; those are fetched ahead
// meanwhile. weight1 streams from the L2 cache.
//
// Gradient. With the embedding e, |y| and the signs of the hidden layer from the forward,
//   d_y = (d_e - e <d_e, e> (1 + 1e-7 / |y|)) / (|y| + 1e-7),   d_hidden = (W2^T d_y) [hidden > 0]
// need neither x nor its hidden layer again. The image's gradient is gathered: the image falls into
// cells of stride x stride pixels; pixel (r, p) of cell (i, j) is pixel (r + s stride,
// p + t stride) of patch (i - s, j - t), for all s, t that stay within the patch, so that
//   d_x = sum_st sum_h W1[h][r + s stride][p + t stride] d_hidden[i - s, j - t][h]
// is one sum in registers, and every pixel is written once.
//
// bfloat16. Where the CPU multiplies bfloat16, and image and weight1 have its values, the first
// layer and its gradient take such products with float32 sums: pairs of neighbouring pixels, then
// pairs of hidden units. Only d_hidden is rounded.
//
// Floor. With M maps, N patches of P pixels, H hidden units and D dimensions, each way takes
// M N H (P + D) multiply-adds; the forward reads x, the backward writes its gradient. The weights'
// gradients take the forward once more and M N H (P + D) on top.
//
// This file is compiled once per instruction set, as MGHF_KERNELS, so everything in it has internal
// linkage (see vector.h).

#include "patches.h"

#include "arena.h"
#include "patch_product.h"
#include "pixels.h"
#include "product.h"
#include "vector.h"

namespace mghf {
namespace {

constexpr float kNormFloor = 1e-7f;
constexpr float kTiny = 1.17549435e-38f;

// ---- groups of maps ----

inline int64_t groups(const PatchesOptions& o) { return (o.maps + kLanes - 1) / kLanes; }

struct Group {
  int64_t first, count;  // maps

  Group(const PatchesOptions& o, int64_t index)
      : first(index * kLanes), count(o.maps - first < kLanes ? o.maps - first : kLanes) {}
};

// The maps are those of all images: calls visit(image, channel, lane, channels) for the pieces of a
// group that lie in one image.
template <class Visit>
inline void for_each_piece(const Group& group, int64_t channels, const Visit& visit) {
  for (int64_t lane = 0; lane < group.count;) {
    const int64_t map = group.first + lane, channel = map % channels;
    const int64_t rest = group.count - lane, here = channels - channel;
    const int64_t piece = here < rest ? here : rest;
    visit(map / channels, channel, lane, piece);
    lane += piece;
  }
}

// A whole group of channels that lie side by side; the compiler knows how many.
template <class T>
inline void read_whole(const T* source, int64_t pixel_step, int64_t pixels, float* out) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[p * kLanes + lane] = read(source + p * pixel_step + lane);
    }
  }
}

template <class T>
inline void write_whole(T* target, int64_t pixel_step, int64_t pixels, const float* in) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      write(target + p * pixel_step + lane, in[p * kLanes + lane]);
    }
  }
}

// Reads a run of pixels of a group of maps into out[pixel][lane].
inline void read_group(const ImageView& v, const Group& group, int64_t y, int64_t x,
                       int64_t pixels, float* out) {
  for_each_piece(group, v.channels, [&](int64_t b, int64_t channel, int64_t lane, int64_t count) {
    if (count < kLanes || v.channel_stride != 1) {
      read_pixels(v, b, y, x, pixels, channel, count, out + lane, kLanes);
      return;
    }
    const int64_t offset =
        b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel;
    if (v.kind == ScalarKind::float32) {
      read_whole(static_cast<const float*>(v.data) + offset, v.column_stride, pixels, out);
    } else {
      read_whole(static_cast<const uint16_t*>(v.data) + offset, v.column_stride, pixels, out);
    }
  });
}

inline void write_group(const MutableImageView& v, const Group& group, int64_t y, int64_t x,
                        int64_t pixels, const float* in) {
  for_each_piece(group, v.channels, [&](int64_t b, int64_t channel, int64_t lane, int64_t count) {
    if (count < kLanes || v.channel_stride != 1) {
      write_pixels(v, b, y, x, pixels, channel, count, in + lane, kLanes);
      return;
    }
    const int64_t offset =
        b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel;
    if (v.kind == ScalarKind::float32) {
      write_whole(static_cast<float*>(v.data) + offset, v.column_stride, pixels, in);
    } else {
      write_whole(static_cast<uint16_t*>(v.data) + offset, v.column_stride, pixels, in);
    }
  });
}

// Zero where a group has no maps, so that no arithmetic meets what memory held before.
inline void clear(float* data, int64_t floats) {
  if (floats == 0) return;  // data may be null, which memset must not get
  __builtin_memset(data, 0, static_cast<size_t>(floats) * sizeof(float));
}

// ---- fetching ahead ----

// Cache lines of a few rows of a group of maps, asked for a few at a time.
class Ahead {
 public:
  static Ahead nothing() { return {}; }

  template <class Data>
  Ahead(const BasicImageView<Data>& v, const Group& group, int64_t y, int64_t x, int64_t rows,
        int64_t pixels)
      : rows_(rows) {
    const int64_t size = v.kind == ScalarKind::float32 ? 4 : 2;
    const int64_t b = group.first / v.channels, channel = group.first % v.channels;
    base_ = static_cast<const char*>(v.data) +
            (b * v.batch_stride + channel * v.channel_stride + y * v.row_stride +
             x * v.column_stride) * size;
    row_step_ = v.row_stride * size;
    if (v.channel_stride == 1) {
      maps_ = 1;
      items_ = pixels;
      item_step_ = v.column_stride * size;
    } else if (v.column_stride == 1) {
      const int64_t here = v.channels - channel;
      maps_ = group.count < here ? group.count : here;
      map_step_ = v.channel_stride * size;
      item_step_ = 64;
      items_ = (pixels * size + 63) / 64;
    } else {
      rows_ = 0;
    }
  }

  // The number of requests.
  int64_t size() const { return rows_ * maps_ * items_; }

  template <bool kWrite>
  void request(int64_t count) {
    for (; count > 0 && row_ < rows_; --count) {
      __builtin_prefetch(base_ + row_ * row_step_ + map_ * map_step_ + item_ * item_step_, kWrite,
                         kWrite ? 3 : 2);
      if (++item_ < items_) continue;
      item_ = 0;
      if (++map_ < maps_) continue;
      map_ = 0;
      ++row_;
    }
  }

 private:
  Ahead() = default;

  const char* base_ = nullptr;
  int64_t rows_ = 0, maps_ = 0, items_ = 0;
  int64_t row_step_ = 0, map_step_ = 0, item_step_ = 0;
  int64_t row_ = 0, map_ = 0, item_ = 0;
};

#if defined(MGHF_AMX)
inline bool tiles_fit(const PatchesOptions& o) {
  return o.patch_size % (2 * kTileWords) == 0 && o.hidden % (2 * kTileWords) == 0;
}
#endif

// ---- the two layers ----

// A group's row of patches.
struct Strip {
  Group group;
  int64_t row;

  Strip(const PatchesOptions& o, int64_t task)
      : group(o, task % groups(o)), row(task / groups(o)) {}
};

struct Layers {
  const PatchesOptions& o;
  const int64_t pitch;       // from patch to patch in `pixels`
  const int64_t chunk_rows;  // rows of pixels at a time

  float* pixels;  // [row of the chunk][pixel][lane], patch n from pixel n pitch on
  float* hidden;  // [patch][unit][lane]
  float* output;  // [patch][dimension][lane]

  static int64_t chunk(const PatchesOptions& o, int64_t run) {
    // 20 KiB in all, less than half of an L1 cache with the widest vectors.
    const int64_t rows = 320 / run < 1 ? 1 : 320 / run;
    return rows < o.patch_size ? rows : o.patch_size;
  }

  int64_t run(int64_t patches) const { return (patches - 1) * pitch + o.patch_size; }

  Layers(const PatchesOptions& o, Arena& arena)
      : o(o),
        pitch(o.stride < o.patch_size ? o.stride : o.patch_size),
        chunk_rows(chunk(o, run(kPatches))) {
    pixels = arena.floats(chunk_rows * run(kPatches) * kLanes);
    hidden = arena.floats(kPatches * o.hidden * kLanes);
    output = arena.floats(kPatches * o.dimension * kLanes);
  }

  void start(const Group& group) const {
    if (group.count < kLanes) clear(pixels, chunk_rows * run(kPatches) * kLanes);
  }

  // Reads pixel rows `first` to `first + rows` of the patches from column j on.
  template <int kN>
  void read_chunk(const ImageView& x, const Strip& strip, int64_t j, int64_t first,
                  int64_t rows) const {
    const int64_t width = run(kN), top = strip.row * o.stride + first;
    for (int64_t r = 0; r < rows; ++r) {
      float* out = pixels + r * width * kLanes;
      if (o.stride <= o.patch_size) {
        read_group(x, strip.group, top + r, j * o.stride, width, out);
        continue;
      }
      for (int64_t n = 0; n < kN; ++n) {
        read_group(x, strip.group, top + r, (j + n) * o.stride, o.patch_size,
                   out + n * pitch * kLanes);
      }
    }
  }

  Ahead next_chunk(const ImageView& x, const Strip& strip, int64_t j, int64_t first,
                   int64_t patches) const {
    if (first >= o.patch_size) {
      j += patches;
      first = 0;
    }
    if (j >= o.columns || o.stride > o.patch_size) return Ahead::nothing();
    const int64_t rest = o.patch_size - first, left = o.columns - j;
    return {x,
            strip.group,
            strip.row * o.stride + first,
            j * o.stride,
            rest < chunk_rows ? rest : chunk_rows,
            run(left < patches ? left : patches)};
  }

  // The hidden layer, before the ReLU, of kN patches of a strip from column j on.
  template <class Factors, int kN>
  void first_layer(const ImageView& x, const Strip& strip, int64_t j) const {
    const int64_t size = o.patch_size, words = size / Factors::kWidth;
    const int64_t blocks = o.hidden / kUnits + 1;
    for (int64_t first = 0; first < size; first += chunk_rows) {
      const int64_t rows = size - first < chunk_rows ? size - first : chunk_rows;
      read_chunk<kN>(x, strip, j, first, rows);
      if constexpr (Factors::kWidth == 2) Factors::pair_neighbours(pixels, rows * run(kN));
      Ahead ahead = next_chunk(x, strip, j, first + rows, kN);
      const int64_t requests = ahead.size() / blocks + 1;
#if defined(MGHF_AMX)
      if (Factors::kWidth == 2 && tiles_fit(o)) {
        first_layer_tiles<kN>(first, rows, [&] { ahead.request<false>(2 * requests); });
        continue;
      }
#endif
      for_each_run<kUnits>(o.hidden, [&]<int kM>(int64_t unit) {
        ahead.request<false>(requests);
        Vec block[kM][kN];
        for (int m = 0; m < kM; ++m) {
          for (int n = 0; n < kN; ++n) {
            block[m][n] = first == 0 ? splat(o.bias1[unit + m]) : at(hidden_at(n, unit + m));
          }
        }
        for (int64_t r = 0; r < rows; ++r) {
          const float* b[kN];
          for (int n = 0; n < kN; ++n) b[n] = pixels + (r * run(kN) + n * pitch) * kLanes;
          const float* a = o.weight1 + ((first + r) * o.hidden + unit) * words;
          add_products<Factors, Factors::kWidth>(block, a, words, 1, b, words);
        }
        for (int m = 0; m < kM; ++m) {
          for (int n = 0; n < kN; ++n) at(hidden_at(n, unit + m)) = block[m][n];
        }
      });
    }
  }

#if defined(MGHF_AMX)
  // The same for rows `first` to `first + rows` of the patches, whose pixels have been read.
  template <int kN, class Progress>
  void first_layer_tiles(int64_t first, int64_t rows, const Progress& progress) const {
    const int64_t size = o.patch_size, words = size / 2;
    if (first == 0) {
      for (int64_t n = 0; n < kN; ++n) {
        for (int64_t unit = 0; unit < o.hidden; ++unit) {
          at(hidden_at(n, unit)) = splat(o.bias1[unit]);
        }
      }
    }
    for (int64_t unit = 0; unit < o.hidden; unit += kTileRows) {
      progress();
      PatchTiles<kN>::load_sums([&](int64_t n) { return hidden_at(n, unit); });
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t word = 0; word < words; word += kTileWords) {
          const float* a = o.weight1 + ((first + r) * o.hidden + unit) * words + word;
          const float* b = pixels + (r * run(kN) + 2 * word) * kLanes;
          PatchTiles<kN>::add_products(
              a, words, [&](int64_t n) { return b + n * pitch * kLanes; }, 2 * kLanes);
        }
      }
      PatchTiles<kN>::store_sums([&](int64_t n) { return hidden_at(n, unit); });
    }
  }
#endif

  // ReLU in place; a NaN stays one. `signs` is told each word of sign bits: patch, word, bits.
  template <int kN, class Signs>
  void relu(const Signs& signs) const {
    for (int n = 0; n < kN; ++n) {
      for (int64_t begin = 0; begin < o.hidden; begin += 32) {
        const int64_t rest = o.hidden - begin, count = rest < 32 ? rest : 32;
        IntVec bits = {};
        for (int64_t k = 0; k < count; ++k) {
          Vec& x = at(hidden_at(n, begin + k));
          bits |= (x > Vec{}) & static_cast<int32_t>(uint32_t{1} << k);
          x = x < Vec{} ? Vec{} : x;
        }
        signs(n, begin / 32, bits);
      }
    }
  }

  // `output` from `hidden`.
  template <int kN>
  void second_layer() const {
    for_each_run<kUnits>(o.dimension, [&]<int kM>(int64_t d) {
      Vec block[kM][kN];
      const float* b[kN];
      for (int n = 0; n < kN; ++n) {
        b[n] = hidden_at(n, 0);
        for (int m = 0; m < kM; ++m) block[m][n] = splat(o.bias2[d + m]);
      }
      add_products<Floats, 1>(block, o.weight2 + d * o.hidden, o.hidden, 1, b, o.hidden);
      for (int n = 0; n < kN; ++n) {
        for (int m = 0; m < kM; ++m) at(output_at(n, d + m)) = block[m][n];
      }
    });
  }

  float* hidden_at(int64_t patch, int64_t unit) const {
    return hidden + (patch * o.hidden + unit) * kLanes;
  }
  float* output_at(int64_t patch, int64_t d) const {
    return output + (patch * o.dimension + d) * kLanes;
  }
};

template <class Factors>
void forward_with(const PatchesOptions& o, const ImageView& x, int64_t task, float* embedding,
                  int32_t* state, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  const Layers layers(o, arena);
  const Strip strip(o, task);
  const Group& group = strip.group;
  const size_t state_bytes = static_cast<size_t>(group.count) * sizeof(int32_t);
  layers.start(group);
  for_each_run<kPatches>(o.columns, [&]<int kN>(int64_t j) {
    const int64_t patch = strip.row * o.columns + j;
    const auto word = [&](int64_t n, int64_t index) {
      return state + ((patch + n) * o.state_words() + index) * o.maps + group.first;
    };
    layers.first_layer<Factors, kN>(x, strip, j);
    layers.relu<kN>([&](int64_t n, int64_t index, IntVec bits) {
      __builtin_memcpy(word(n, 1 + index), &bits, state_bytes);
    });
    layers.second_layer<kN>();
    for (int64_t n = 0; n < kN; ++n) {
      Vec norm = {};
      for (int64_t d = 0; d < o.dimension; ++d) {
        const Vec y = at(layers.output_at(n, d));
        norm += y * y;
      }
      for (int64_t lane = 0; lane < kLanes; ++lane) norm[lane] = __builtin_sqrtf(norm[lane]);
      __builtin_memcpy(word(n, 0), &norm, state_bytes);
      const Vec scale = 1.0f / (norm + kNormFloor);
      for (int64_t d = 0; d < o.dimension; ++d) at(layers.output_at(n, d)) *= scale;
      write_pixels(embedding + (group.first * o.patches() + patch + n) * o.dimension, 1,
                   o.patches() * o.dimension, o.dimension, group.count, layers.output_at(n, 0),
                   kLanes);
    }
  });
}

void forward(const PatchesOptions& o, const ImageView& x, int64_t task, float* embedding,
             int32_t* state, void* workspace) {
#if defined(__AVX512BF16__)
  if (o.pairs) {
    [[maybe_unused]] const Tiles tiles;
    return forward_with<Pairs>(o, x, task, embedding, state, workspace);
  }
#endif
  forward_with<Floats>(o, x, task, embedding, state, workspace);
}

size_t forward_bytes(const PatchesOptions& o) {
  Arena arena{nullptr};
  Layers(o, arena);
  return arena.used;
}

// ---- gradient before the ReLU ----

struct OutputGradient {
  const PatchesOptions& o;
  const PatchesGradient& gradient;

  float* grad;       // [patch][dimension][lane], of the embeddings and then of y
  float* embedding;  // [dimension][lane]

  OutputGradient(const PatchesOptions& o, const PatchesGradient& gradient, Arena& arena)
      : o(o), gradient(gradient) {
    grad = arena.floats(kPatches * o.dimension * kLanes);
    embedding = arena.floats(o.dimension * kLanes);
  }

  void start(const Group& group) const {
    if (group.count == kLanes) return;
    clear(grad, kPatches * o.dimension * kLanes);
    clear(embedding, o.dimension * kLanes);
  }

  float* grad_at(int64_t n, int64_t d) const { return grad + (n * o.dimension + d) * kLanes; }

  IntVec state_word(const Group& group, int64_t patch, int64_t index) const {
    IntVec word = {};
    __builtin_memcpy(
        &word, gradient.state + (patch * o.state_words() + index) * o.maps + group.first,
        static_cast<size_t>(group.count) * sizeof(int32_t));
    return word;
  }

  // `grad` of the outputs y of kN patches.
  template <int kN>
  void output(const Group& group, int64_t patch) const {
    const EmbeddingView& g = gradient.grad;
    for (int64_t n = 0; n < kN; ++n) {
      read_pixels(g.data + group.first * g.map_stride + (patch + n) * g.patch_stride,
                  g.dimension_stride, g.map_stride, o.dimension, group.count, grad_at(n, 0),
                  kLanes);
      read_pixels(
          gradient.embedding + (group.first * o.patches() + patch + n) * o.dimension, 1,
          o.patches() * o.dimension, o.dimension, group.count, embedding, kLanes);
      const Vec norm = reinterpret_cast<Vec>(state_word(group, patch + n, 0));
      Vec along = {};
      for (int64_t d = 0; d < o.dimension; ++d) {
        along += at(grad_at(n, d)) * at(embedding + d * kLanes);
      }
      // At y = 0 the embedding is 0 as well; the maximum only keeps 0/0 away.
      along *= 1.0f + kNormFloor / max(norm, splat(kTiny));
      const Vec scale = 1.0f / (norm + kNormFloor);
      for (int64_t d = 0; d < o.dimension; ++d) {
        at(grad_at(n, d)) = (at(grad_at(n, d)) - at(embedding + d * kLanes) * along) * scale;
      }
    }
  }

  // From `grad` the gradient before the ReLU of kN patches, out[patch][unit][lane].
  template <int kN>
  void hidden(const Group& group, int64_t patch, float* out) const {
    const float* b[kN];
    for (int n = 0; n < kN; ++n) b[n] = grad_at(n, 0);
    for_each_run<kUnits>(o.hidden, [&]<int kM>(int64_t unit) {
      Vec block[kM][kN] = {};
      add_products<Floats, 1>(block, o.weight2 + unit, 1, o.hidden, b, o.dimension);
      for (int n = 0; n < kN; ++n) {
        for (int m = 0; m < kM; ++m) at(out + (n * o.hidden + unit + m) * kLanes) = block[m][n];
      }
    });
    for (int64_t n = 0; n < kN; ++n) {
      for (int64_t begin = 0; begin < o.hidden; begin += 32) {
        const int64_t rest = o.hidden - begin, count = rest < 32 ? rest : 32;
        const IntVec bits = state_word(group, patch + n, 1 + begin / 32);
        for (int64_t k = 0; k < count; ++k) {
          const IntVec positive = bits & static_cast<int32_t>(uint32_t{1} << k);
          // A product, so that a NaN stays one.
          at(out + (n * o.hidden + begin + k) * kLanes) *= positive != 0 ? splat(1) : Vec{};
        }
      }
    }
  }
};

struct HiddenGradient {
  OutputGradient output_gradient;
  float* floats;  // [patch][unit][lane], before it becomes pairs

  HiddenGradient(const PatchesOptions& o, const PatchesGradient& gradient, Arena& arena)
      : output_gradient(o, gradient, arena) {
    floats = arena.floats(o.pairs ? kPatches * o.hidden * kLanes : 0);
  }
};

void hidden(const PatchesOptions& o, const PatchesGradient& gradient, int64_t task,
            float* grad_hidden, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  const HiddenGradient s(o, gradient, arena);
  const Strip strip(o, task);
  const int64_t patch_floats = o.hidden_words() * kLanes;
  s.output_gradient.start(strip.group);
  grad_hidden += task % groups(o) * o.patches() * patch_floats;
  for_each_run<kPatches>(o.columns, [&]<int kN>(int64_t j) {
    const int64_t patch = strip.row * o.columns + j;
    float* out = grad_hidden + patch * patch_floats;
    s.output_gradient.output<kN>(strip.group, patch);
#if defined(__AVX512BF16__)
    if (o.pairs) {
      s.output_gradient.hidden<kN>(strip.group, patch, s.floats);
      for (int64_t n = 0; n < kN; ++n) {
        const float* from = s.floats + n * o.hidden * kLanes;
        for (int64_t unit = 0; unit < o.hidden; unit += 2, out += kLanes) {
          const bool both = unit + 1 < o.hidden;
          const Vec second = both ? at(from + (unit + 1) * kLanes) : Vec{};
          at(out) = Pairs::pair(at(from + unit * kLanes), second);
        }
      }
      return;
    }
#endif
    s.output_gradient.hidden<kN>(strip.group, patch, out);
  });
}

size_t hidden_bytes(const PatchesOptions& o) {
  Arena arena{nullptr};
  HiddenGradient(o, {}, arena);
  return arena.used;
}

// ---- gradient of the image ----

struct Gather {
  const PatchesOptions& o;
  const int64_t cell;   // width of a cell in the image
  const int64_t terms;  // patches that cover a cell's first pixels, per direction
  const int64_t full;   // how many pixels these are; the others have one patch less

  float* zeros;   // the gradient of a patch that the image has not
  float* pixels;  // [pixel][lane], one row of kPatches cells
  float* before;  // what the image's gradient was

  Gather(const PatchesOptions& o, Arena& arena)
      : o(o),
        cell(o.stride < o.width ? o.stride : o.width),
        terms((o.patch_size + o.stride - 1) / o.stride),
        full(o.patch_size - (terms - 1) * o.stride) {
    zeros = arena.floats(o.hidden_words() * kLanes);
    pixels = arena.floats(kPatches * cell * kLanes);
    before = arena.floats(kPatches * cell * kLanes);
  }

  // Row r of kN cells of row i from column j on.
  template <class Factors, int kN, class Progress>
  void row(const float* grad_hidden, int64_t i, int64_t j, int64_t r,
           const Progress& progress) const {
    columns<Factors, kN>(grad_hidden, i, j, r, 0, full < cell ? full : cell, terms, progress);
    if (full < cell) {
      columns<Factors, kN>(grad_hidden, i, j, r, full, cell, terms - 1, progress);
    }
  }

  // Its pixels `begin` to `end` of every cell, under which `count` patches lie side by side.
  template <class Factors, int kN, class Progress>
  void columns(const float* grad_hidden, int64_t i, int64_t j, int64_t r, int64_t begin,
               int64_t end, int64_t count, const Progress& progress) const {
    const int64_t words = o.hidden_words();
    // Calls visit(a, b): a are the weights of pixel `begin`, b[n] the gradient of cell n's patch.
    const auto for_each_term = [&](const auto& visit) {
      for (int64_t s = 0; s < terms && r + s * o.stride < o.patch_size; ++s) {
        if (i - s < 0 || i - s >= o.rows) continue;
        for (int64_t t = 0; t < count; ++t) {
          const float* b[kN];
          bool any = false;
          for (int n = 0; n < kN; ++n) {
            const int64_t column = j + n - t;
            const bool exists = column >= 0 && column < o.columns;
            any |= exists;
            b[n] = exists ? grad_hidden + ((i - s) * o.columns + column) * words * kLanes : zeros;
          }
          if (!any) continue;
          const int64_t row = r + s * o.stride, column = begin + t * o.stride;
          visit(o.weight1 + row * words * o.patch_size + column * pixel_step<Factors>(), b);
        }
      }
    };
#if defined(MGHF_AMX)
    if (Factors::kWidth == 2 && tiles_fit(o)) {
      for (int64_t offset = 0; offset < end - begin; offset += kTileRows) {
        progress();
        PatchTiles<kN>::zero_sums();
        for_each_term([&](const float* a, const float* const(&b)[kN]) {
          for (int64_t word = 0; word < words; word += kTileWords) {
            PatchTiles<kN>::add_products(
                a + offset * words + word, words,
                [&](int64_t n) { return b[n] + word * kLanes; }, kLanes);
          }
        });
        alignas(64) float sums[kN][kTileRows * kLanes];
        PatchTiles<kN>::store_sums([&](int64_t n) { return sums[n]; });
        const int64_t rest = end - begin - offset, rows = rest < kTileRows ? rest : kTileRows;
        for (int64_t n = 0; n < kN; ++n) {
          __builtin_memcpy(pixels + (n * cell + begin + offset) * kLanes, sums[n],
                           static_cast<size_t>(rows * kLanes) * sizeof(float));
        }
      }
      return;
    }
#endif
    for_each_run<kUnits>(end - begin, [&]<int kM>(int64_t offset) {
      progress();
      Vec block[kM][kN] = {};
      for_each_term([&](const float* a, const float* const(&b)[kN]) {
        add_products<Factors, 1>(block, a + offset * pixel_step<Factors>(), pixel_step<Factors>(),
                                 word_step<Factors>(), b, words);
      });
      for (int n = 0; n < kN; ++n) {
        for (int m = 0; m < kM; ++m) {
          at(pixels + (n * cell + begin + offset + m) * kLanes) = block[m][n];
        }
      }
    });
  }

  // From pixel to pixel and from word to word of the weights: floats lie as in the forward, pairs
  // by [pixel][word].
  template <class Factors>
  int64_t pixel_step() const {
    return Factors::kWidth == 1 ? 1 : o.hidden_words();
  }
  template <class Factors>
  int64_t word_step() const {
    return Factors::kWidth == 1 ? o.patch_size : 1;
  }
};

template <class Factors>
void image_with(const PatchesOptions& o, const float* grad_hidden, const MutableImageView& grad_x,
                bool add, int64_t task, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  const Gather gather(o, arena);
  const Group group(o, task % groups(o));
  const int64_t i = task / groups(o), rest = o.height - i * o.stride;
  const int64_t rows = rest < o.stride ? rest : o.stride;
  clear(gather.zeros, o.hidden_words() * kLanes);
  const ImageView old{grad_x.data,          grad_x.kind,           grad_x.batch,
                      grad_x.channels,      grad_x.height,         grad_x.width,
                      grad_x.batch_stride,  grad_x.channel_stride, grad_x.row_stride,
                      grad_x.column_stride};
  grad_hidden += task % groups(o) * o.patches() * o.hidden_words() * kLanes;
  for_each_run<kPatches>((o.width + o.stride - 1) / o.stride, [&]<int kN>(int64_t j) {
    const int64_t left = o.width - j * o.stride;
    const int64_t pixels = left < kN * gather.cell ? left : kN * gather.cell;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = i * o.stride + r;
      Ahead ahead(grad_x, group, y, j * o.stride, 1, pixels);
      const int64_t requests =
          (ahead.size() * kUnits + gather.cell - 1) / gather.cell;
      gather.row<Factors, kN>(grad_hidden, i, j, r, [&] { ahead.request<true>(requests); });
      if (add) {
        read_group(old, group, y, j * o.stride, pixels, gather.before);
        for (int64_t p = 0; p < pixels * kLanes; p += kLanes) {
          at(gather.pixels + p) += at(gather.before + p);
        }
      }
      write_group(grad_x, group, y, j * o.stride, pixels, gather.pixels);
    }
  });
}

void image(const PatchesOptions& o, const float* grad_hidden, const MutableImageView& grad_x,
           bool add, int64_t task, void* workspace) {
#if defined(__AVX512BF16__)
  if (o.pairs) {
    [[maybe_unused]] const Tiles tiles;
    return image_with<Pairs>(o, grad_hidden, grad_x, add, task, workspace);
  }
#endif
  image_with<Floats>(o, grad_hidden, grad_x, add, task, workspace);
}

size_t image_bytes(const PatchesOptions& o) {
  Arena arena{nullptr};
  Gather(o, arena);
  return arena.used;
}

// ---- gradients of the weights ----

int64_t padded_hidden(const PatchesOptions& o) { return round_up(o.hidden, kLanes); }

// Adds kM x kN vectors of a product to memory.
template <int kM, int kN>
inline void add_product(float* out, int64_t out_row, const float* a, int64_t a_row,
                        const float* b, int64_t b_step, int64_t patches, int64_t a_patch,
                        int64_t b_patch, int64_t maps) {
  Vec block[kM][kN];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) block[m][n] = at(out + m * out_row + n * kLanes);
  }
  for (int64_t k = 0; k < patches; ++k) {
    multiply_add(block, a + k * a_patch, a_row, 1, b + k * b_patch, b_step, maps);
  }
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) at(out + m * out_row + n * kLanes) = block[m][n];
  }
}

// out[m][h] += sum over patches and maps of a[patch][m][lane] b[patch][lane][h], h < hidden padded.
inline void add_outer_products(const PatchesOptions& o, float* out, int64_t rows, const float* a,
                               int64_t a_patch, const float* b, int64_t patches, int64_t maps) {
  const int64_t padded = padded_hidden(o);
  for_each_block(rows, padded / kLanes, [&]<int kM, int kN>(int64_t m, int64_t n) {
    add_product<kM, kN>(out + m * padded + n * kLanes, padded, a + m * kLanes, kLanes,
                        b + n * kLanes, padded, patches, a_patch, kLanes * padded, maps);
  });
}

// [unit][lane] -> [lane][unit] of one patch; `out` has zeros beyond the last unit.
inline void transpose_hidden(const PatchesOptions& o, const Group& group, const float* in,
                             float* out) {
  write_pixels(out, 1, padded_hidden(o), o.hidden, group.count, in, kLanes);
}

int64_t layer2_size(const PatchesOptions& o) {
  return (o.dimension + 1) * padded_hidden(o) + round_up(o.dimension, kLanes);
}

struct Layer2 {
  Layers layers;
  OutputGradient output_gradient;
  float* grad;        // before the ReLU, [patch][unit][lane]
  float* transposed;  // the hidden layer, [patch][lane][unit]
  float* bias2;       // the gradient of bias2, [dimension][lane]

  Layer2(const PatchesOptions& o, const PatchesGradient& gradient, Arena& arena)
      : layers(o, arena), output_gradient(o, gradient, arena) {
    grad = arena.floats(kPatches * o.hidden * kLanes);
    transposed = arena.floats(kPatches * kLanes * padded_hidden(o));
    bias2 = arena.floats(o.dimension * kLanes);
  }
};

void layer2(const PatchesOptions& o, const PatchesGradient& gradient, const ImageView& x,
            int64_t task, float* grad_hidden, float* sums, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  const Layer2 s(o, gradient, arena);
  const Strip strip(o, task);
  const Group& group = strip.group;
  const int64_t padded = padded_hidden(o), patch_floats = kLanes * padded;
  float *weight2 = sums, *bias1 = sums + o.dimension * padded, *bias2 = bias1 + padded;
  s.layers.start(group);
  s.output_gradient.start(group);
  clear(sums, layer2_size(o));
  clear(s.transposed, kPatches * patch_floats);
  clear(s.bias2, o.dimension * kLanes);
  grad_hidden += task % groups(o) * o.patches() * patch_floats;
  for_each_run<kPatches>(o.columns, [&]<int kN>(int64_t j) {
    const int64_t patch = strip.row * o.columns + j;
    float* out = grad_hidden + patch * patch_floats;
    s.output_gradient.output<kN>(group, patch);
    s.output_gradient.hidden<kN>(group, patch, s.grad);
    s.layers.first_layer<Floats, kN>(x, strip, j);
    s.layers.relu<kN>([](int64_t, int64_t, IntVec) {});
    clear(out, kN * patch_floats);
    for (int64_t n = 0; n < kN; ++n) {
      transpose_hidden(o, group, s.grad + n * o.hidden * kLanes, out + n * patch_floats);
      transpose_hidden(o, group, s.layers.hidden_at(n, 0), s.transposed + n * patch_floats);
      for (int64_t d = 0; d < o.dimension; ++d) {
        at(s.bias2 + d * kLanes) += at(s.output_gradient.grad_at(n, d));
      }
      for (int64_t lane = 0; lane < group.count; ++lane) {
        for (int64_t h = 0; h < padded; h += kLanes) {
          at(bias1 + h) += at(out + n * patch_floats + lane * padded + h);
        }
      }
    }
    add_outer_products(o, weight2, o.dimension, s.output_gradient.grad_at(0, 0),
                       o.dimension * kLanes, s.transposed, kN, group.count);
  });
  for (int64_t d = 0; d < o.dimension; ++d) {
    for (int64_t lane = 0; lane < group.count; ++lane) bias2[d] += s.bias2[d * kLanes + lane];
  }
}

size_t layer2_bytes(const PatchesOptions& o) {
  Arena arena{nullptr};
  Layer2(o, {}, arena);
  return arena.used;
}

constexpr int64_t kParts = 4;

// The strips of part `task / patch_size`, and of their patches the pixel row `task % patch_size`.
void layer1(const PatchesOptions& o, const float* grad_hidden, const ImageView& x, int64_t task,
            float* sums, void* workspace) {
  Arena arena{static_cast<char*>(workspace)};
  const Layers layers(o, arena);
  const int64_t padded = padded_hidden(o), strips = groups(o) * o.rows;
  const int64_t part = task / o.patch_size, row = task % o.patch_size;
  clear(sums, o.patch_size * padded);
  for (int64_t index = strips * part / kParts; index < strips * (part + 1) / kParts; ++index) {
    const Strip strip(o, index);
    const float* grad = grad_hidden + (index % groups(o) * o.patches() + strip.row * o.columns) *
                                          kLanes * padded;
    for_each_run<kPatches>(o.columns, [&]<int kN>(int64_t j) {
      layers.read_chunk<kN>(x, strip, j, row, 1);
      add_outer_products(o, sums, o.patch_size, layers.pixels, layers.pitch * kLanes,
                         grad + j * kLanes * padded, kN, strip.group.count);
    });
  }
}

}  // namespace

#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

const PatchesKernels MGHF_KERNELS = {
    kLanes, kPairs,        forward_bytes, forward,      hidden_bytes, hidden, image_bytes,
    image,  padded_hidden, layer2_size,   layer2_bytes, layer2,       kParts, forward_bytes,
    layer1,
};

}  // namespace mghf
