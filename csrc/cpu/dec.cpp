// DECLoss on the CPU. See mghf_fast/reference/dec.py for the mathematics.
//
// Method. With unit patches s, g and E = exp(./t) the loss needs, for every row i, the sums over
// its positives and its negatives j of E(<s_i, s_j>) + 2 E(<g_i, s_j>). The pairs are visited tile
// by tile and never stored. Being positive is symmetric, and so is <s_i, s_j>: a task takes tiles
// (a, b) and (b, a) at once, and of a block of pairs three products (<s_i, s_j>, <g_i, s_j>,
// <s_i, g_j>) give both tiles' exponentials. Tasks follow each other in rounds, tile a with tile
// (r - a) mod n in round r: no two tasks of a round share a tile, so every sum is added up in an
// order that depends on the shape only, whatever the number of threads.
//
// Derivative. With factor f_i = c / (t Qpos_i) for a positive pair, -c / (t Qneg_i) for a negative,
//   d loss / d s_j = sum_i (f_i + f_j) E(<s_i, s_j>) s_i + 2 f_i E(<g_i, s_j>) g_i.
// A task computes its tile's weights again and multiplies them with s and g: four more products.
// The projection off the norm comes last.
//
// Thresholds. A pair is positive if the float32 sum of (G_id - G_jd)^2 is at most `limit`. That sum
// is taken only where it can matter: first, sums over 16 segments of the patches bound the distance
// from below (Cauchy-Schwarz), which finds whole blocks of pairs negative; then the distance comes
// from |G_i|^2 + |G_j|^2 - 2 <G_i, G_j>; and only pairs that this leaves within its proven rounding
// error of the limit are decided by the sum of differences.
//
// Floor, with P^2 D the multiply-adds of one product of all pairs: 1.5 P^2 D forward and 3.5 P^2 D
// backward, plus P^2 D / 2 where blocks hold similar pairs and 1.5 P^2 exponentials in either.
//
// This file is compiled once per instruction set, as MGHF_KERNELS, so everything in it has internal
// linkage (see vector.h).

#include "dec_pairs.h"

namespace mghf {
namespace {

// ---- forward ----

// Sums over the pairs of one task; rows' sums are kept lane by lane.
struct TaskSums {
  float *row_positive, *row_negative, *row_any;           // _any: above 0 if there is a negative
  float *column_positive, *column_negative, *column_any;

  TaskSums(int64_t tile, Arena& arena) {
    row_positive = arena.floats(tile * kLanes);
    row_negative = arena.floats(tile * kLanes);
    row_any = arena.floats(tile * kLanes);
    column_positive = arena.floats(tile);
    column_negative = arena.floats(tile);
    column_any = arena.floats(tile);
  }

  void clear(int64_t tile) const {
    for (int64_t k = 0; k < tile * kLanes; ++k) row_positive[k] = row_negative[k] = row_any[k] = 0;
    for (int64_t k = 0; k < tile; ++k) {
      column_positive[k] = column_negative[k] = column_any[k] = 0;
    }
  }
};

// Adds own + 2 cross to the rows' sums and, off the diagonal, own + 2 other_cross to the columns'.
template <int kM, class Positive>
inline void add(const Exponentials<kM>& e, const Positive& positive, const Pairs& pairs,
                const TaskSums& sums, int64_t i, int64_t j) {
  constexpr bool kMixed = !__is_same(Positive, AllNegative);
  const int64_t row = (i - pairs.row_begin) * kLanes, column = j - pairs.column_begin;
  for (int m = 0; m < kM; ++m) {
    Vec negatives = {}, positives = {}, any = kMixed ? Vec{} : splat(1);
    for (int n = 0; n < kN; ++n) {
      const Vec x = e.own[m][n] + 2.0f * e.cross[m][n];
      if constexpr (kMixed) {
        const IntVec is_negative = pairs.valid(j + n * kLanes) & ~positive[m][n];
        positives += positive[m][n] ? x : Vec{};
        negatives += is_negative ? x : Vec{};
        any += is_negative ? splat(1) : Vec{};
      } else {
        negatives += x;
      }
    }
    at(sums.row_negative + row + m * kLanes) += negatives;
    at(sums.row_any + row + m * kLanes) += any;
    if constexpr (kMixed) at(sums.row_positive + row + m * kLanes) += positives;
  }
  if (pairs.diagonal) return;
  for (int n = 0; n < kN; ++n) {
    Vec negatives = {}, positives = {}, any = kMixed ? Vec{} : splat(1);
    for (int m = 0; m < kM; ++m) {
      const Vec x = e.own[m][n] + 2.0f * e.other_cross[m][n];
      if constexpr (kMixed) {
        positives += positive[m][n] ? x : Vec{};
        negatives += positive[m][n] ? Vec{} : x;
        any += positive[m][n] ? Vec{} : splat(1);
      } else {
        negatives += x;
      }
    }
    at(sums.column_negative + column + n * kLanes) += negatives;
    at(sums.column_any + column + n * kLanes) += any;
    if constexpr (kMixed) at(sums.column_positive + column + n * kLanes) += positives;
  }
}

void forward(const DecOptions& options, int64_t tile, int64_t other, void* packed, DecSums result,
             void* workspace) {
  Arena arena{static_cast<char*>(packed)};
  const Packed p(options, false, arena);
  const Pairs pairs(options, p, tile, other);
  Arena scratch{static_cast<char*>(workspace)};
  const int64_t size = tile_size(options);
  const TaskSums sums(size, scratch);
  sums.clear(size);

  pairs.for_each_pair_block([&]<int kM>(int64_t i, int64_t j) {
    const Exponentials<kM> e(pairs, i, j);
    if (e.positive == nullptr) {
      add(e, AllNegative{}, pairs, sums, i, j);
    } else {
      add(e, e.mask, pairs, sums, i, j);
    }
  });

  for (int64_t i = pairs.row_begin; i < pairs.row_end; ++i) {
    const int64_t row = (i - pairs.row_begin) * kLanes;
    result.positive[i] += static_cast<double>(sum(at(sums.row_positive + row)));
    result.negative[i] += static_cast<double>(sum(at(sums.row_negative + row)));
    result.has_negative[i] |= sum(at(sums.row_any + row)) > 0;
  }
  if (pairs.diagonal) return;
  for (int64_t j = pairs.column_begin; j < pairs.column_end; ++j) {
    const int64_t column = j - pairs.column_begin;
    result.positive[j] += static_cast<double>(sums.column_positive[column]);
    result.negative[j] += static_cast<double>(sums.column_negative[column]);
    result.has_negative[j] |= sums.column_any[column] > 0;
  }
}

// ---- backward ----

// The factors of s and g in the gradients of rows and of columns, (tile, tile). The products read
// them down the columns too: a stride of a power of two would keep a column in a few of the cache's
// sets.
struct Weights {
  const int64_t stride;
  float *own, *cross, *other_cross;

  Weights(int64_t tile, Arena& arena) : stride(tile + kLanes) {
    own = arena.floats(tile * stride);
    cross = arena.floats(tile * stride);
    other_cross = arena.floats(tile * stride);
  }
};

// From exponentials to weights: those of own cosines get both rows' factors, (dR + dR^T).
template <int kM, class Positive>
inline void store(const Exponentials<kM>& e, const Positive& positive, const Pairs& pairs,
                  const Weights& weights, int64_t i, int64_t j) {
  const Packed& p = pairs.p;
  const int64_t place = (i - pairs.row_begin) * weights.stride + j - pairs.column_begin;
  for (int n = 0; n < kN; ++n) {
    const Vec column_positive = at(p.positive_factor + j + n * kLanes);
    const Vec column_negative = at(p.negative_factor + j + n * kLanes);
    const Vec column_scale = 2.0f * at(p.g_inverse + j + n * kLanes);
    for (int m = 0; m < kM; ++m) {
      Vec row = splat(p.negative_factor[i + m]), column = column_negative;
      if constexpr (!__is_same(Positive, AllNegative)) {
        row = positive[m][n] ? splat(p.positive_factor[i + m]) : row;
        column = positive[m][n] ? column_positive : column;
      }
      const int64_t k = place + m * weights.stride + n * kLanes;
      at(weights.own + k) = e.own[m][n] * (row + column);
      at(weights.cross + k) = e.cross[m][n] * (row * (2 * p.g_inverse[i + m]));
      if (pairs.diagonal) continue;
      at(weights.other_cross + k) = e.other_cross[m][n] * (column * column_scale);
    }
  }
}

// One operand of the products below: weight(m, k) = data[m * row + k * step].
struct Factors {
  const float* data;
  int64_t row, step;
};

// grad_m += sum_k a(m, k) s_k + b(m, k) g_k, for `count` patches from `begin` and `depth` patches
// from `source`.
void add_products(const Packed& p, int64_t begin, int64_t count, Factors a, Factors b,
                  int64_t source, int64_t depth) {
  const float *s = p.s_rows + source * p.padded, *g = p.g_rows + source * p.padded;
  for_each_block(count, p.padded / kLanes, [&]<int kM, int kVectors>(int64_t m, int64_t n) {
    float* grad = p.grad + (begin + m) * p.padded + n * kLanes;
    Vec block[kM][kVectors];
    for (int r = 0; r < kM; ++r) {
      for (int c = 0; c < kVectors; ++c) block[r][c] = at(grad + r * p.padded + c * kLanes);
    }
    multiply_add(block, a.data + m * a.row, a.row, a.step, s + n * kLanes, p.padded, depth);
    multiply_add(block, b.data + m * b.row, b.row, b.step, g + n * kLanes, p.padded, depth);
    for (int r = 0; r < kM; ++r) {
      for (int c = 0; c < kVectors; ++c) at(grad + r * p.padded + c * kLanes) = block[r][c];
    }
  });
}

void backward(const DecOptions& options, int64_t tile, int64_t other, void* packed,
              void* workspace) {
  Arena arena{static_cast<char*>(packed)};
  const Packed p(options, true, arena);
  const Pairs pairs(options, p, tile, other);
  Arena scratch{static_cast<char*>(workspace)};
  const Weights weights(tile_size(options), scratch);

  pairs.for_each_pair_block([&]<int kM>(int64_t i, int64_t j) {
    const Exponentials<kM> e(pairs, i, j);
    if (e.positive == nullptr) {
      store(e, AllNegative{}, pairs, weights, i, j);
    } else {
      store(e, e.mask, pairs, weights, i, j);
    }
  });

  const int64_t rows = pairs.row_end - pairs.row_begin;
  const int64_t columns = pairs.column_end - pairs.column_begin, size = weights.stride;
  const Factors by_row{pairs.diagonal ? weights.cross : weights.other_cross,
                       pairs.diagonal ? 1 : size, pairs.diagonal ? size : 1};
  add_products(p, pairs.row_begin, rows, {weights.own, size, 1}, by_row, pairs.column_begin,
               columns);
  if (pairs.diagonal) return;
  add_products(p, pairs.column_begin, columns, {weights.own, 1, size}, {weights.cross, 1, size},
               pairs.row_begin, rows);
}

void project(const DecOptions& options, int64_t tile, void* packed, float* grad_sr) {
  Arena arena{static_cast<char*>(packed)};
  const Packed p(options, true, arena);
  const int64_t begin = tile * tile_size(options);
  const int64_t end = smaller(begin + tile_size(options), options.patches);
  for (int64_t i = begin; i < end; ++i) {
    const float *s = p.s_rows + i * p.padded, *grad = p.grad + i * p.padded;
    float* out = grad_sr + i * p.depth;
    Vec product = {};
    for (int64_t d = 0; d < p.padded; d += kLanes) product += at(s + d) * at(grad + d);
    // Below the floor a patch is divided by a constant and nothing is projected out.
    const float along = p.s_norm[i] > options.norm_floor ? sum(product) : 0;
    const float inverse = 1 / (p.s_norm[i] < options.norm_floor ? options.norm_floor : p.s_norm[i]);
    for (int64_t d = 0; d < p.depth; ++d) out[d] = (grad[d] - s[d] * along) * inverse;
  }
}

size_t packed_bytes(const DecOptions& options, bool backward) {
  Arena arena{nullptr};
  const Packed p(options, backward, arena);
  return arena.used;
}

size_t workspace_bytes(const DecOptions& options, bool backward) {
  Arena arena{nullptr};
  if (backward) {
    const Weights weights(tile_size(options), arena);
  } else {
    const TaskSums sums(tile_size(options), arena);
  }
  return arena.used;
}

}  // namespace

const DecKernels MGHF_KERNELS = {tile_size, packed_bytes, workspace_bytes, pack,
                                 forward,   backward,     project};

}  // namespace mghf
