// The gradients of the weights of `patches`; see patches.cpp.
#pragma once

#include "patches_gradient.h"

namespace mghf {
namespace {

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

// Sums over the strips of part `task / patch_size`, for pixel row `task % patch_size` of the
// patches.
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
}  // namespace mghf
