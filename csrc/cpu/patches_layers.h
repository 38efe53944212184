// The two layers of `patches`: the forward's kernel; see patches.cpp.
#pragma once

#include "patches_maps.h"

namespace mghf {
namespace {

constexpr float kNormFloor = 1e-7f;
constexpr float kTiny = 1.17549435e-38f;

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

  // Reads pixel rows `first` to `first + rows` of kN patches from column j on.
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

  Prefetch next_chunk(const ImageView& x, const Strip& strip, int64_t j, int64_t first,
                   int64_t patches) const {
    if (first >= o.patch_size) {
      j += patches;
      first = 0;
    }
    if (j >= o.columns || o.stride > o.patch_size) return Prefetch::nothing();
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
      Prefetch ahead = next_chunk(x, strip, j, first + rows, kN);
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

  // ReLU in place; a NaN stays one. Calls signs(patch, word, bits) for each word of sign bits.
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

  // Computes `output` from `hidden`.
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

}  // namespace
}  // namespace mghf
