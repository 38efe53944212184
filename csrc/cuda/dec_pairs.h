// Blocks of pairs of patches: what kernels read of the patches, their products, and which pairs are
// positive.
//
// Products. Patches are divided by their norms, whatever the floor, and written as two halves, big
// and small, the latter in units of 2^-11 of the former: together exact to 2^-22 of a value, or
// 2^-36. Three products of halves then are as exact as float32, with half the instructions and the
// bytes of three of TF32, and nothing is split again where patches meet. Products over 16 values
// are added up in float32 outside the tensor cores, which truncate; those of small parts, 2^-11 of
// the others, inside. What the floor does to a patch is a factor of its cosines, 1 for most.
//
// Thresholds. A pair is positive if the float32 sum of (G_id - G_jd)^2 is at most `limit`. That is
// first computed as |G_i|^2 + |G_j|^2 - 2 <G_i, G_j>; only the pairs that this leaves within its
// rounding error of the limit are decided by the sum of differences.
#pragma once

#include <math.h>

#include "dec.h"
#include "mma.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

constexpr int kPairThreads = 256;
constexpr int kTile = 64;   // patches of a block, and of a step through the others
constexpr int kChunk = 32;  // values of a patch that are in shared memory at a time
constexpr int kWords = 8;   // of 16 bytes, for a patch's chunk: 4 of big parts, 4 of small ones
constexpr int kMatrix = kTile * kWords;  // a tile's chunk
constexpr int kStage = 4 * kMatrix;      // what is copied at a time: two tiles of S and G
constexpr int kColumnTiles = 4;          // products of 16 x 8 of a warp, side by side
constexpr float kUnit = 2048.0f;         // small parts are multiplied by it

// ---- the patches, packed for the products ----

// Arrays have `padded` entries, a multiple of kTile; padding is zeros.
struct Packed {
  int patches, padded, depth, chunks;
  uint4 *sr, *gt;          // unit patches, [patch][chunk][kWords]
  float *sr_norm, *gt_norm;
  float *sr_ratio, *gt_ratio;  // norm / max(norm, floor)
  float* gt_squared;           // |G|^2

  Packed(const DecOptions& options, Pieces& pieces)
      : patches(static_cast<int>(options.patches)),
        padded((patches + kTile - 1) / kTile * kTile),
        depth(static_cast<int>(options.depth)),
        chunks((depth + kChunk - 1) / kChunk) {
    const int64_t words = static_cast<int64_t>(padded) * chunks * kWords;
    sr = pieces.take<uint4>(words);
    gt = pieces.take<uint4>(words);
    for (float** array : {&sr_norm, &gt_norm, &sr_ratio, &gt_ratio, &gt_squared}) {
      *array = pieces.take<float>(padded);
    }
  }
  __host__ __device__ int tiles() const { return padded / kTile; }
};

// Two numbers as two halves each, the small ones in units of 1 / kUnit.
struct SplitHalves {
  uint32_t big, small;

  __device__ __forceinline__ SplitHalves(float first, float second)
      : big(pair_of<Half>(first, second)),
        small(pair_of<Half>(rest(first, big), rest(second, big >> 16))) {}
  static __device__ __forceinline__ float rest(float x, uint32_t half) {
    return (x - to_float(Half{static_cast<uint16_t>(half)})) * kUnit;
  }
};

// The columns of a run, in tiles; runs are added up in order afterwards.
struct TileRuns {
  int length, number;

  TileRuns(int tiles, int wanted_blocks) {
    const int most = wanted_blocks / tiles < tiles ? wanted_blocks / tiles : tiles;
    const int wanted = most > 1 ? most : 1;
    length = (tiles + wanted - 1) / wanted;
    number = (tiles + length - 1) / length;
  }
};

// ---- copies into shared memory ----

// The place of a word in a tile's chunk: any word of eight neighbouring rows is in eight different
// groups of banks.
__device__ __forceinline__ int place(int row, int word) {
  return row * kWords + (word ^ (row & 7));
}

// Begins to copy a chunk of S and G of 64 patches into two matrices of a stage.
__device__ __forceinline__ void copy_chunk(uint4* to_sr, uint4* to_gt, const Packed& p, int first,
                                           int chunk) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < kMatrix / kPairThreads; ++i) {
    const int c = i * kPairThreads + static_cast<int>(threadIdx.x);
    const int row = c / kWords, word = c % kWords;
    const int64_t from = (static_cast<int64_t>(first + row) * p.chunks + chunk) * kWords + word;
    copy_async<16>(to_sr + place(row, word), p.sr + from);
    copy_async<16>(to_gt + place(row, word), p.gt + from);
  }
}

// ---- products ----

// A warp's part of a tile of pairs: 16 rows and 32 columns. A thread has, in the order of mma.h,
// numbers [n][e] of rows row + e / 2 * 8 and columns column + n * 8 + e % 2.
struct PairPlace {
  int first_row, first_column, row, column;

  __device__ __forceinline__ PairPlace() {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
    first_row = warp / 2 * 16;
    first_column = warp % 2 * (kColumnTiles * 8);
    row = first_row + thread % kWarp / 4;
    column = first_column + thread % 4 * 2;
  }
};

// Products of unit patches. Their small parts are kept apart until `finish`.
struct PairProducts {
  float values[kColumnTiles][4], rest[kColumnTiles][4];

  __device__ __forceinline__ void clear() {
    MGHF_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) {
      MGHF_UNROLL_ALL
      for (int e = 0; e < 4; ++e) values[n][e] = rest[n][e] = 0;
    }
  }
  // Adds products over 16 values; factors are big and small parts.
  __device__ __forceinline__ void add(int n, const uint32_t (&a)[2][4], const uint32_t (&b)[2][2]) {
    float d[4] = {};
    mma_pairs<Half>(d, a[0], b[0]);
    mma_pairs<Half>(rest[n], a[1], b[0]);
    mma_pairs<Half>(rest[n], a[0], b[1]);
    MGHF_UNROLL_ALL
    for (int e = 0; e < 4; ++e) values[n][e] += d[e];
  }
  __device__ __forceinline__ void finish() {
    MGHF_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) {
      MGHF_UNROLL_ALL
      for (int e = 0; e < 4; ++e) values[n][e] += rest[n][e] * (1 / kUnit);
    }
  }
};

// Row-major factors a of 16 rows: [0] big, [1] small parts of values 16 step to 16 step + 15.
__device__ __forceinline__ void load_rows(uint32_t (&a)[2][4], const uint4* matrix, int first,
                                          int step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int row = first + lane % 16, word = step * 2 + lane / 16;
  load_matrices(a[0], matrix + place(row, word));
  load_matrices(a[1], matrix + place(row, word + kWords / 2));
}

// Factors b of two tiles of 8 columns, whose values are contiguous: [part][2 tile + half].
__device__ __forceinline__ void load_columns(uint32_t (&b)[2][4], const uint4* matrix, int first,
                                             int step) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int column = first + lane % 8 + lane / 16 * 8, word = step * 2 + lane / 8 % 2;
  load_matrices(b[0], matrix + place(column, word));
  load_matrices(b[1], matrix + place(column, word + kWords / 2));
}

// Adds a chunk's products <s_i, s_j>, <g_i, g_j>, and <g_i, s_j> or, with kCrossOfColumns,
// <s_i, g_j>. The stage has S and G of the rows, then of the columns; `steps` of 16 values are no
// padding.
template <bool kCrossOfColumns>
__device__ __forceinline__ void add_chunk(PairProducts& own, PairProducts& cross,
                                          PairProducts& truth, const uint4* stage,
                                          const PairPlace& at, int steps) {
  MGHF_UNROLL(1)
  for (int step = 0; step < steps; ++step) {
    uint32_t s_i[2][4], g_i[2][4];
    load_rows(s_i, stage, at.first_row, step);
    load_rows(g_i, stage + kMatrix, at.first_row, step);
    MGHF_UNROLL_ALL
    for (int two = 0; two < kColumnTiles; two += 2) {
      uint32_t s_j[2][4], g_j[2][4];
      load_columns(s_j, stage + 2 * kMatrix, at.first_column + two * 8, step);
      load_columns(g_j, stage + 3 * kMatrix, at.first_column + two * 8, step);
      MGHF_UNROLL_ALL
      for (int n = 0; n < 2; ++n) {
        const uint32_t of_s[2][2] = {{s_j[0][2 * n], s_j[0][2 * n + 1]},
                                     {s_j[1][2 * n], s_j[1][2 * n + 1]}};
        const uint32_t of_g[2][2] = {{g_j[0][2 * n], g_j[0][2 * n + 1]},
                                     {g_j[1][2 * n], g_j[1][2 * n + 1]}};
        own.add(two + n, s_i, of_s);
        truth.add(two + n, g_i, of_g);
        if constexpr (kCrossOfColumns) {
          cross.add(two + n, s_i, of_g);
        } else {
          cross.add(two + n, g_i, of_s);
        }
      }
    }
  }
}

// ---- positive pairs ----

struct Thresholds {
  float limit, positive_below, negative_above, margin;

  explicit Thresholds(const DecOptions& options) : limit(options.limit) {
    constexpr double kRoundoff = 1.0 / (1 << 24);
    const double depth = static_cast<double>(options.depth);
    // The sum of differences is within (D + 4) roundoffs of the exact distance (twice that, for
    // the roundings here), and may lose squares below float32's normal range.
    const double own = 2 * (depth + 4) * kRoundoff, tiny = depth * 1e-37;
    // In roundoffs of |G_i|^2 + |G_j|^2, which bounds 2 |<G_i, G_j>| and all that adds up to it:
    // unit patches 12, products of small parts 4, truncation 44, additions D / 16, norms and the
    // distance itself 10.
    const double error = (160 + depth / 2) * kRoundoff;
    margin = static_cast<float>(error);
    positive_below = static_cast<float>(limit * (1 - own) - tiny);
    negative_above = static_cast<float>(limit * (1 + own) + tiny);
    if (own >= 0.25 || error >= 0.25 || !isfinite(negative_above)) {  // differences decide
      positive_below = -INFINITY;
      negative_above = INFINITY;
    }
  }
};

__device__ inline float squared_distance(const Matrices& gt, int64_t i, int64_t j) {
  float sum = 0;
  with_element(gt.element, [&](auto element) {
    const auto patch = gt.matrix<decltype(element)>(0);
    MGHF_UNROLL(4)
    for (int64_t d = 0; d < gt.columns; ++d) {
      const float difference = patch(i, d) - patch(j, d);
      sum += difference * difference;
    }
  });
  return sum;
}

// A pair's row, as kernels need it for its columns.
struct PairRow {
  int i;
  float sr_ratio, gt_ratio, gt_norm, gt_squared;

  __device__ __forceinline__ PairRow(const Packed& p, int i)
      : i(i),
        sr_ratio(p.sr_ratio[i]),
        gt_ratio(p.gt_ratio[i]),
        gt_norm(p.gt_norm[i]),
        gt_squared(p.gt_squared[i]) {}
};

// Sets of a thread's pairs: bit 4 n + e is the one of number [n][e].
struct PairMasks {
  uint32_t pairs = 0, positives = 0;  // no padding; positive ones among these
};

// `truth`: <G_i, G_j> / (|G_i| |G_j|); `first`: the tile's first column.
__device__ __forceinline__ PairMasks positive_pairs(const float (&truth)[kColumnTiles][4],
                                                    const PairRow (&rows)[2], int first,
                                                    const PairPlace& at, const Packed& p,
                                                    const Matrices& gt, const Thresholds& t) {
  PairMasks masks;
  uint32_t undecided = 0;
  MGHF_UNROLL_ALL
  for (int n = 0; n < kColumnTiles; ++n) {
    MGHF_UNROLL_ALL
    for (int e = 0; e < 4; ++e) {
      const PairRow& row = rows[e / 2];
      const int j = first + at.column + n * 8 + e % 2;
      const uint32_t bit = 1u << (4 * n + e);
      const float total = row.gt_squared + p.gt_squared[j];
      const float distance = total - 2 * truth[n][e] * (row.gt_norm * p.gt_norm[j]);
      const float error = t.margin * total;
      const bool positive = row.i == j || distance + error < t.positive_below;
      if (row.i >= p.patches || j >= p.patches) continue;
      masks.pairs |= bit;
      if (positive) masks.positives |= bit;
      // A NaN is neither above nor below.
      if (!positive && !(distance - error > t.negative_above)) undecided |= bit;
    }
  }
  while (undecided != 0) {
    const uint32_t bit = undecided & (0 - undecided);
    undecided ^= bit;
    int number = 0;
    while (bit >> number != 1) ++number;
    const int i = rows[0].i + number % 4 / 2 * 8;
    const int j = first + at.column + number / 4 * 8 + number % 2;
    if (squared_distance(gt, i, j) <= t.limit) masks.positives |= bit;
  }
  return masks;
}

}  // namespace

}  // namespace mghf::cuda
