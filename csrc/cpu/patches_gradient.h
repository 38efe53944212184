// The gradient of the image of `patches`; see patches.cpp.
#pragma once

#include "patches_layers.h"

namespace mghf {
namespace {

// ---- gradient before the ReLU ----

struct OutputGradient {
  const PatchesOptions& o;
  const PatchesGradient& gradient;

  float* grad;       // [patch][dimension][lane], first of the embeddings, then of y
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
    const int64_t row = patch * o.state_words() + index;
    __builtin_memcpy(&word, gradient.state + row * gradient.state_step + group.first,
                     static_cast<size_t>(group.count) * sizeof(int32_t));
    return word;
  }

  // Computes `grad` of the outputs y of kN patches.
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
      // At y = 0 the embedding is 0 as well; the maximum only prevents 0/0.
      along *= 1.0f + kNormFloor / max(norm, splat(kTiny));
      const Vec scale = 1.0f / (norm + kNormFloor);
      for (int64_t d = 0; d < o.dimension; ++d) {
        at(grad_at(n, d)) = (at(grad_at(n, d)) - at(embedding + d * kLanes) * along) * scale;
      }
    }
  }

  // Computes from `grad` the gradient before the ReLU of kN patches, out[patch][unit][lane].
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
          // A product and not a selection: a NaN must stay one.
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

  float* zeros;   // the gradient of a patch outside the image
  float* pixels;  // [pixel][lane], one row of kPatches cells
  float* before;  // the image's previous gradient

  Gather(const PatchesOptions& o, Arena& arena)
      : o(o),
        cell(o.stride < o.width ? o.stride : o.width),
        terms((o.patch_size + o.stride - 1) / o.stride),
        full(o.patch_size - (terms - 1) * o.stride) {
    zeros = arena.floats(o.hidden_words() * kLanes);
    pixels = arena.floats(kPatches * cell * kLanes);
    before = arena.floats(kPatches * cell * kLanes);
  }

  // Computes pixel row r of kN cells of row i from column j on.
  template <class Factors, int kN, class Progress>
  void row(const float* grad_hidden, int64_t i, int64_t j, int64_t r,
           const Progress& progress) const {
    columns<Factors, kN>(grad_hidden, i, j, r, 0, full < cell ? full : cell, terms, progress);
    if (full < cell) {
      columns<Factors, kN>(grad_hidden, i, j, r, full, cell, terms - 1, progress);
    }
  }

  // The pixels `begin` to `end` of that row of every cell, which `count` neighbouring patches
  // cover.
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

  // Strides of the weights from pixel to pixel and from word to word: floats have the order of the
  // forward, pairs are [pixel][word].
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
      Prefetch ahead(grad_x, group, y, j * o.stride, 1, pixels);
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

}  // namespace
}  // namespace mghf
