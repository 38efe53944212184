// Blocks of pairs of patches for `dec`: the packed patches, their products, and the exponentials of
// their cosines; see dec.cpp.
#pragma once

#include "arena.h"
#include "dec.h"
#include "product.h"
#include "vector.h"

namespace mghf {
namespace {

constexpr int kN = kBlockVectors;
constexpr int64_t kPanel = kN * kLanes;  // adjacent columns of a transposed operand
constexpr int64_t kSegments = 16;
constexpr float kUnitRoundoff = 5.9604645e-8f;  // 2^-24
constexpr float kInfinity = __builtin_inff();

template <int kM>
using Block = Vec[kM][kN];
template <int kM>
using Mask = IntVec[kM][kN];

// Large tiles cost less traffic, many tiles keep more threads busy. 192 is a multiple of both sides
// of every instruction set's block.
int64_t tile_size(const DecOptions& options) { return options.patches >= 2048 ? 192 : 64; }

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether all lanes of a comparison are true. (Lanes are -1 or 0.)
inline bool all(IntVec x) { return sum(__builtin_convertvector(x, Vec)) == -kLanes; }

// 2^y: 0 below float32's normal range, infinity above its range; NaN stays NaN.
inline Vec exp2(Vec y) {
  const Vec low = splat(-126.0f), high = splat(128.49f);
  y = low > y ? low : y;  // in this order the comparisons let NaN pass
  y = high < y ? high : y;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's last bits are the nearest integer
  const Vec rounded = y + magic;
  const Vec x = y - (rounded - magic);
  // 2 * 2^x on [-0.5, 0.5], vector.h's polynomial; the other half of the power is a normal number
  // as long as the result does not overflow.
  Vec p = splat(2 * 0.0001546986459288746f);
  p = p * x + 2 * 0.0013400566531345248f;
  p = p * x + 2 * 0.00961802527308464f;
  p = p * x + 2 * 0.05550326779484749f;
  p = p * x + 2 * 0.24022650718688965f;
  p = p * x + 2 * 0.6931471824645996f;
  p = p * x + 2.0f;
  return p * reinterpret_cast<Vec>((reinterpret_cast<IntVec>(rounded) + 126) << 23);
}

// ---- the patches, packed for the products ----

// `rows` are padded to whole vectors. `panels` hold kPanel patches each, transposed: the values d
// of a panel's patches are contiguous.
struct Packed {
  const int64_t depth;   // D
  const int64_t padded;  // D, rounded up to whole vectors
  float *s_rows, *s_panels;  // unit SR patches
  float *g_rows, *g_panels;  // GT patches as they are
  float *s_norm, *g_inverse;  // |S_i|; 1 / |G_i|, the norm floored
  float* g_squared;           // |G_i|^2
  // Lower bounds of distances: |G_i - G_j|^2 >= offset_i + offset_j + <rows_i, panels_j>, with
  // rounding allowed for. The offsets of padding and of values that are not finite bound nothing.
  float *segment_rows, *segment_panels, *segment_offset;
  float *positive_factor, *negative_factor;  // backward only, as all below
  float* grad;                               // rows, of the unit patches

  Packed(const DecOptions& options, bool backward, Arena& arena)
      : depth(options.depth), padded(round_up(options.depth, kLanes)) {
    const int64_t patches = round_up(options.patches, kPanel);
    s_rows = arena.floats(patches * padded);
    s_panels = arena.floats(patches * depth);
    g_rows = arena.floats(patches * padded);
    g_panels = arena.floats(patches * depth);
    s_norm = arena.floats(patches);
    g_inverse = arena.floats(patches);
    g_squared = arena.floats(patches);
    segment_rows = arena.floats(patches * kSegments);
    segment_panels = arena.floats(patches * kSegments);
    segment_offset = arena.floats(patches);
    positive_factor = arena.floats(backward ? patches : 0);
    negative_factor = arena.floats(backward ? patches : 0);
    grad = arena.floats(backward ? patches * padded : 0);
  }
};

// Relative error of a float32 sum of `count` products, in any order.
float rounding_bound(int64_t count) {
  const float error = static_cast<float>(count) * kUnitRoundoff;
  return error < 0.25f ? error / (1 - error) : kInfinity;
}

double sum_of_squares(const float* x, int64_t count) {
  double partial[8] = {};
  int64_t d = 0;
  for (; d + 8 <= count; d += 8) {
    for (int64_t k = 0; k < 8; ++k) {
      partial[k] += static_cast<double>(x[d + k]) * static_cast<double>(x[d + k]);
    }
  }
  for (; d < count; ++d) partial[0] += static_cast<double>(x[d]) * static_cast<double>(x[d]);
  return ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
         ((partial[4] + partial[5]) + (partial[6] + partial[7]));
}

// Copies patch i into a padded row.
void load_patch(PatchesView view, int64_t i, int64_t depth, int64_t padded, float* row) {
  const float* source = view.data + i * view.patch_stride;
  if (view.value_stride == 1) {
    __builtin_memcpy(row, source, static_cast<size_t>(depth) * sizeof(float));
  } else {
    for (int64_t d = 0; d < depth; ++d) row[d] = source[d * view.value_stride];
  }
  for (int64_t d = depth; d < padded; ++d) row[d] = 0;
}

// rows, each `stride` long, of one panel -> (count, kPanel)
void transpose(const float* rows, int64_t stride, int64_t count, float* panel) {
  for (int64_t d = 0; d < count; ++d) {
    for (int64_t i = 0; i < kPanel; ++i) panel[d * kPanel + i] = rows[i * stride + d];
  }
}

void pack_segments(const Packed& p, int64_t i) {
  const float* patch = p.g_rows + i * p.padded;
  float* row = p.segment_rows + i * kSegments;
  // Beyond this, products might overflow.
  const bool usable = p.g_squared[i] < 1e36f;
  const int64_t length = (p.depth + kSegments - 1) / kSegments;
  double squared = 0;
  for (int64_t k = 0; k < kSegments; ++k) {
    const int64_t begin = smaller(k * length, p.depth), end = smaller(begin + length, p.depth);
    double total = 0;
    for (int64_t d = begin; d < end; ++d) total += static_cast<double>(patch[d]);
    const double mean = end > begin && usable
                            ? total / __builtin_sqrt(static_cast<double>(end - begin))
                            : 0;
    row[k] = static_cast<float>(mean);
    squared += static_cast<double>(row[k]) * static_cast<double>(row[k]);
  }
  // The sum of both offsets and kSegments products: kSegments + 1 roundings of up to twice
  // |G_i|^2 + |G_j|^2, and a few of the segments and the offsets themselves.
  const double error = (2 * kSegments + 16) * static_cast<double>(kUnitRoundoff);
  p.segment_offset[i] = usable ? static_cast<float>(squared - error * p.g_squared[i]) : -1e37f;
}

void pack(const DecOptions& options, PatchesView sr, PatchesView gt, const DecFactors* factors,
          int64_t tile, void* packed) {
  Arena arena{static_cast<char*>(packed)};
  const Packed p(options, factors != nullptr, arena);
  const int64_t size = tile_size(options), begin = tile * size;
  const int64_t end = smaller(begin + size, options.patches);
  for (int64_t i = begin; i < end; ++i) {
    float *s = p.s_rows + i * p.padded, *g = p.g_rows + i * p.padded;
    load_patch(sr, i, p.depth, p.padded, s);
    load_patch(gt, i, p.depth, p.padded, g);
    const float norm = static_cast<float>(__builtin_sqrt(sum_of_squares(s, p.depth)));
    const float inverse = 1 / (norm < options.norm_floor ? options.norm_floor : norm);
    for (int64_t d = 0; d < p.padded; d += kLanes) at(s + d) *= inverse;
    const double g_squared = sum_of_squares(g, p.depth);
    const float g_norm = static_cast<float>(__builtin_sqrt(g_squared));
    p.s_norm[i] = norm;
    p.g_inverse[i] = 1 / (g_norm < options.norm_floor ? options.norm_floor : g_norm);
    p.g_squared[i] = static_cast<float>(g_squared);
    pack_segments(p, i);
    if (factors != nullptr) {
      p.positive_factor[i] = factors->positive[i];
      p.negative_factor[i] = factors->negative[i];
      for (int64_t d = 0; d < p.padded; d += kLanes) at(p.grad + i * p.padded + d) = Vec{};
    }
  }
  const int64_t padded_end = round_up(end, kPanel);
  for (int64_t i = end; i < padded_end; ++i) {
    for (int64_t d = 0; d < p.padded; d += kLanes) {
      at(p.s_rows + i * p.padded + d) = at(p.g_rows + i * p.padded + d) = Vec{};
    }
    for (int64_t k = 0; k < kSegments; ++k) p.segment_rows[i * kSegments + k] = 0;
    p.g_inverse[i] = p.g_squared[i] = 0;
    p.segment_offset[i] = -1e37f;
    if (factors != nullptr) p.positive_factor[i] = p.negative_factor[i] = 0;
  }
  for (int64_t j = begin; j < padded_end; j += kPanel) {
    transpose(p.s_rows + j * p.padded, p.padded, p.depth, p.s_panels + j * p.depth);
    transpose(p.g_rows + j * p.padded, p.padded, p.depth, p.g_panels + j * p.depth);
    transpose(p.segment_rows + j * kSegments, kSegments, kSegments,
              p.segment_panels + j * kSegments);
  }
  // The panels meet -2 times the rows: |a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>.
  for (int64_t k = begin * kSegments; k < padded_end * kSegments; ++k) p.segment_rows[k] *= -2;
}

// ---- blocks of pairs ----

// The pairs of tile `a` (rows) with tile `b` (columns).
struct Pairs {
  const DecOptions& options;
  const Packed& p;
  const int64_t row_begin, row_end, column_begin, column_end;
  const bool diagonal;
  float clear_above, positive_below, negative_above, margin;

  Pairs(const DecOptions& options, const Packed& p, int64_t a, int64_t b)
      : options(options),
        p(p),
        row_begin(a * tile_size(options)),
        row_end(smaller(row_begin + tile_size(options), options.patches)),
        column_begin(b * tile_size(options)),
        column_end(smaller(column_begin + tile_size(options), options.patches)),
        diagonal(a == b) {
    // The float32 sum of differences is within `own` of the exact distance, and may lose squares
    // below float32's normal range. Its bound is doubled to cover the roundings here.
    const float own = 2 * rounding_bound(p.depth + 4);
    const float tiny = static_cast<float>(p.depth) * 1e-37f;
    clear_above = negative_above = options.limit * (1 + own) + tiny;
    positive_below = options.limit * (1 - own) - tiny;
    margin = rounding_bound(p.depth + 16);
    if (!(negative_above < kInfinity && margin < kInfinity)) {  // differences decide
      clear_above = negative_above = kInfinity;
      positive_below = -kInfinity;
    }
  }

  // Calls visit.template operator()<kM>(i, j) for blocks of kM rows from i, kPanel columns from j.
  template <class Visit>
  void for_each_pair_block(const Visit& visit) const {
    for (int64_t j = column_begin; j < column_end; j += kPanel) {
      for_each_row_block(row_end - row_begin, [&]<int kM>(int64_t m) {
        visit.template operator()<kM>(row_begin + m, j);
      });
    }
  }

  template <int kM>
  void multiply(Block<kM>& block, const float* rows, int64_t i, const float* panels,
                int64_t j) const {
    multiply_add(block, rows + i * p.padded, p.padded, 1, panels + j * p.depth, kPanel, p.depth);
  }

  // Float32 squared distances of patch i from kLanes patches, from differences.
  Vec distances(int64_t i, const float* panel_column) const {
    const float* row = p.g_rows + i * p.padded;
    Vec partial[4] = {};
    int64_t d = 0;
    for (; d + 4 <= p.depth; d += 4) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vec difference = row[d + k] - at(panel_column + (d + k) * kPanel);
        partial[k] += difference * difference;
      }
    }
    for (; d < p.depth; ++d) {
      const Vec difference = row[d] - at(panel_column + d * kPanel);
      partial[0] += difference * difference;
    }
    return (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }

  // Whether every pair of a block is a true negative (no padding among them).
  template <int kM>
  bool all_negative(int64_t i, int64_t j) const {
    if (diagonal && i < j + kPanel && j < i + kM) return false;
    Block<kM> bound;
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        bound[m][n] = p.segment_offset[i + m] + at(p.segment_offset + j + n * kLanes);
      }
    }
    multiply_add(bound, p.segment_rows + i * kSegments, kSegments, 1,
                 p.segment_panels + j * kSegments, kPanel, kSegments);
    Vec least = bound[0][0];
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) least = min(least, bound[m][n]);
    }
    return all(least > clear_above);
  }

  template <int kM>
  void find_positives(int64_t i, int64_t j, Mask<kM>& positive) const {
    Block<kM> product = {};
    multiply(product, p.g_rows, i, p.g_panels, j);
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        const int64_t column = j + n * kLanes;
        const Vec total = p.g_squared[i + m] + at(p.g_squared + column);
        const Vec distance = total - 2.0f * product[m][n], error = margin * total;
        positive[m][n] = distance + error < positive_below;
        if (!all(positive[m][n] | (distance - error > negative_above))) {
          positive[m][n] =
              distances(i + m, p.g_panels + j * p.depth + n * kLanes) <= options.limit;
        }
        positive[m][n] &= valid(column);
        if (const int64_t self = i + m - column; self >= 0 && self < kLanes) {
          positive[m][n][self] = -1;
        }
      }
    }
  }

  // The columns of a vector that are no padding.
  IntVec valid(int64_t column) const {
    IntVec result;
    for (int64_t k = 0; k < kLanes; ++k) result[k] = column + k < column_end ? -1 : 0;
    return result;
  }
};

// ---- exponentials ----

// The factors that turn a block of products into cosines.
enum class Scale { none, rows, columns };

// Takes the place of a mask: no pair is positive.
struct AllNegative {};

// From products to exp(cosine / t), with the pair's temperature: `positive` is a mask, or
// AllNegative.
template <Scale kScale, int kM, class Positive>
inline void take_exponentials(const Block<kM>& block, const Positive& positive, const Pairs& pairs,
                              int64_t i, int64_t j, Block<kM>& result) {
  const float *row_scale = pairs.p.g_inverse + i, *column_scale = pairs.p.g_inverse + j;
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      Vec exponent = splat(pairs.options.negative_exponent);
      if constexpr (!__is_same(Positive, AllNegative)) {
        exponent = positive[m][n] ? splat(pairs.options.positive_exponent) : exponent;
      }
      if constexpr (kScale == Scale::rows) exponent *= row_scale[m];
      if constexpr (kScale == Scale::columns) exponent *= at(column_scale + n * kLanes);
      result[m][n] = exp2(block[m][n] * exponent);
    }
  }
}

// The exponentials of a block of <rows_i, panels_j>. Not inlined: next to other blocks the compiler
// would keep the sums of the product in memory instead of registers.
template <Scale kScale, int kM>
__attribute__((noinline)) void exponentials(const float* rows, const float* panels,
                                            const Mask<kM>* positive, const Pairs& pairs,
                                            int64_t i, int64_t j, Block<kM>& result) {
  Block<kM> block = {};
  pairs.template multiply<kM>(block, rows, i, panels, j);
  if (positive == nullptr) {
    take_exponentials<kScale, kM>(block, AllNegative{}, pairs, i, j, result);
  } else {
    take_exponentials<kScale, kM>(block, *positive, pairs, i, j, result);
  }
}

// The exponentials of a block of pairs.
template <int kM>
struct Exponentials {
  Block<kM> own, cross, other_cross;  // of <s_i, s_j>, <g_i, s_j>, <s_i, g_j>
  Mask<kM> mask;
  const Mask<kM>* positive;  // null if all are negatives

  Exponentials(const Pairs& pairs, int64_t i, int64_t j) : positive(nullptr) {
    const Packed& p = pairs.p;
    if (!pairs.template all_negative<kM>(i, j)) {
      pairs.template find_positives<kM>(i, j, mask);
      positive = &mask;
    }
    exponentials<Scale::none, kM>(p.s_rows, p.s_panels, positive, pairs, i, j, own);
    exponentials<Scale::rows, kM>(p.g_rows, p.s_panels, positive, pairs, i, j, cross);
    if (pairs.diagonal) return;
    exponentials<Scale::columns, kM>(p.s_rows, p.g_panels, positive, pairs, i, j, other_cross);
  }
};

}  // namespace
}  // namespace mghf
