// The gradient of DECLoss. With f_i = 1 / (t Qpos_i) for a positive pair, -1 / (t Qneg_i) for a
// negative one, unit patches u = S / |S|, v = G / |G| and their ratios r and q to the floored ones,
//
//   d loss / d s_i = c sum_j (f_i + f_j) E(<s_i, s_j>) r_j u_j + 2 f_j E(<g_j, s_i>) q_j v_j
//
// A block takes 64 rows, a run of columns and up to 192 values of the patches. For 64 columns at a
// time it computes the pairs' products again, writes both factors of u and v to shared memory as
// halves, scaled by a power of two for each row, and multiplies them with the columns' patches,
// which it copies once more: their values now are what is summed over, so they are read transposed.
#pragma once

#include "dec_pairs.h"

namespace mghf::cuda {

namespace {

constexpr int kWideChunk = 2 * kChunk;  // values that are multiplied with the factors at a time
constexpr int kMostSums = 3;            // of as many values, which a block takes

// ---- factors of rows ----

struct RowFactors {
  float *positive, *negative;  // f_i of positive and of negative pairs; 0 in the padding
  float* scale;                // c

  RowFactors(const Packed& p, Pieces& pieces)
      : positive(pieces.take<float>(p.padded)),
        negative(pieces.take<float>(p.padded)),
        scale(pieces.take<float>(1)) {}
};

// The sum over a block's threads, in a fixed order, for all of them.
template <class T>
__device__ T sum_over_block(T value, T* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  shared[thread] = value;
  __syncthreads();
  for (int left = static_cast<int>(blockDim.x) / 2; left > 0; left /= 2) {
    if (thread < left) shared[thread] += shared[thread + left];
    __syncthreads();
  }
  return shared[0];
}

// By one block: it counts the rows with negatives, and writes everything else.
__global__ void __launch_bounds__(kPairThreads)
    factors_of_rows(const float* grad, const float* statistics, DecScales scales, RowFactors to,
                    int patches, int padded) {
  __shared__ int counts[kPairThreads];
  const int thread = static_cast<int>(threadIdx.x);
  int rows = 0;
  for (int i = thread; i < padded; i += kPairThreads) {
    const bool is_row = i < patches;
    const float positive = is_row ? statistics[i] : 1.0f;
    const float negative = is_row ? statistics[patches + i] : -1.0f;
    const bool found = negative != -1.0f;
    rows += found ? 1 : 0;
    // A row without negatives has no gradient, unless it has a NaN.
    to.positive[i] = (found ? scales.positive : 0.0f) / positive;
    to.negative[i] = (found ? -scales.negative : 0.0f) / negative;
  }
  rows = sum_over_block(rows, counts);
  if (thread == 0) *to.scale = -*grad / static_cast<float>(rows > 0 ? rows : 1);
}

// ---- pairs ----

// A block's shared memory besides the stages: the factors of u and v, big and small parts of each,
// and the powers of two by which a row's factors of 32 columns were divided.
struct PairFactors {
  uint4* matrices;  // [2][2], 64 rows of 64 halves each
  float* scales;    // [2][kTile]

  __device__ uint4* of(int patch, int part) const {
    return matrices + (2 * patch + part) * kMatrix;
  }
};
constexpr size_t kFactorBytes = 4 * kMatrix * sizeof(uint4) + 2 * kTile * sizeof(float);
constexpr size_t kGradientBytes = 2 * kStage * sizeof(uint4) + kFactorBytes;

// Writes a thread's factors of u and v.
__device__ __forceinline__ void store_factors(const PairFactors& to,
                                              const float (&of_sr)[kColumnTiles][4],
                                              const float (&of_gt)[kColumnTiles][4],
                                              const PairPlace& at) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    const int row = at.row + half * 8;
    float most = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) {
      MGHF_UNROLL_ALL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        most = fmaxf(most, fmaxf(fabsf(of_sr[n][e]), fabsf(of_gt[n][e])));
      }
    }
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
    // The power of two below the largest, and its inverse, as long as both are normal numbers.
    const int exponent = static_cast<int>(bits_as<uint32_t>(most) >> 23);
    const int bounded = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    const float inverse = bits_as<float>(static_cast<uint32_t>(254 - bounded) << 23);
    if (t == 0) {
      to.scales[at.first_column / (kColumnTiles * 8) * kTile + row] =
          bits_as<float>(static_cast<uint32_t>(bounded) << 23);
    }
    MGHF_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) {
      const int word = place(row, at.first_column / 8 + n) * 4 + t, e = 2 * half;
      const SplitHalves u(of_sr[n][e] * inverse, of_sr[n][e + 1] * inverse);
      const SplitHalves v(of_gt[n][e] * inverse, of_gt[n][e + 1] * inverse);
      reinterpret_cast<uint32_t*>(to.of(0, 0))[word] = u.big;
      reinterpret_cast<uint32_t*>(to.of(0, 1))[word] = u.small;
      reinterpret_cast<uint32_t*>(to.of(1, 0))[word] = v.big;
      reinterpret_cast<uint32_t*>(to.of(1, 1))[word] = v.small;
    }
  }
}

// A warp's part of 64 rows and 64 values: sums [m][n][e] of rows row + m * 16 + e / 2 * 8 and
// values value + n * 8 + e % 2.
using ValueSums = float[2][2][4];

struct ValuePlace {
  int first_row, first_value, row, value;

  __device__ __forceinline__ ValuePlace() {
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
    first_row = warp / 4 * 32;
    first_value = warp % 4 * 16;
    row = first_row + thread % kWarp / 4;
    value = first_value + thread % 4 * 2;
  }
};

// Adds the factors' products with 64 values of the columns' patches. The stage has two chunks of
// u, then of v. `halves`: how many times 32 columns are no padding.
__device__ __forceinline__ void add_values(ValueSums& sums, const PairFactors& factors,
                                           const uint4* stage, const ValuePlace& at, int halves) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int chunk = at.first_value / kChunk;
  const int first_word = at.first_value % kChunk / 8;
  MGHF_UNROLL(1)
  for (int half = 0; half < halves; ++half) {
    float d[2][2][4] = {}, rest[2][2][4] = {};
    MGHF_UNROLL_ALL
    for (int step = 0; step < 2; ++step) {
      MGHF_UNROLL_ALL
      for (int patch = 0; patch < 2; ++patch) {
        uint32_t b[2][4];
        const int column = half * 32 + step * 16 + lane % 16, word = first_word + lane / 16;
        const uint4* const matrix = stage + (2 * patch + chunk) * kMatrix;
        load_transposed(b[0], matrix + place(column, word));
        load_transposed(b[1], matrix + place(column, word + kWords / 2));
        MGHF_UNROLL_ALL
        for (int m = 0; m < 2; ++m) {
          uint32_t a[2][4];
          const int row = at.first_row + m * 16 + lane % 16;
          const int column_word = half * 4 + step * 2 + lane / 16;
          load_matrices(a[0], factors.of(patch, 0) + place(row, column_word));
          load_matrices(a[1], factors.of(patch, 1) + place(row, column_word));
          MGHF_UNROLL_ALL
          for (int n = 0; n < 2; ++n) {
            const uint32_t big[2] = {b[0][2 * n], b[0][2 * n + 1]};
            const uint32_t small[2] = {b[1][2 * n], b[1][2 * n + 1]};
            mma_pairs<Half>(d[m][n], a[0], big);
            mma_pairs<Half>(rest[m][n], a[1], big);
            mma_pairs<Half>(rest[m][n], a[0], small);
          }
        }
      }
    }
    MGHF_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      MGHF_UNROLL_ALL
      for (int e = 0; e < 4; ++e) {
        const float scale = factors.scales[half * kTile + at.row + m * 16 + e / 2 * 8];
        MGHF_UNROLL_ALL
        for (int n = 0; n < 2; ++n) {
          sums[m][n][e] += scale * (d[m][n][e] + rest[m][n][e] * (1 / kUnit));
        }
      }
    }
  }
}

// partial: (runs, padded, 32 chunks). kSums: how many times 64 values a block takes.
template <int kSums>
__global__ void __launch_bounds__(kPairThreads)
    gradient_of_pairs(Packed p, Matrices gt, Thresholds t, TileRuns runs, RowFactors factors,
                      float positive_exponent, float negative_exponent, float* partial) {
  MGHF_DYNAMIC_SHARED(uint4, stages);
  const PairFactors of_pairs{stages + 2 * kStage,
                             reinterpret_cast<float*>(stages + 2 * kStage + 4 * kMatrix)};
  const int block = static_cast<int>(blockIdx.x), tiles = p.tiles();
  const int first_i = block % tiles * kTile, run = block / tiles % runs.number;
  const int slice = block / tiles / runs.number;
  const int begin = run * runs.length;
  const int end = begin + runs.length < tiles ? begin + runs.length : tiles;
  const int first_chunk = slice * kSums * 2;
  const int wide_left = (p.chunks - first_chunk + 1) / 2;
  const int wide = wide_left < kSums ? wide_left : kSums;
  const PairPlace at;
  const ValuePlace values;
  const PairRow rows[2] = {{p, first_i + at.row}, {p, first_i + at.row + 8}};
  float of_positives[2], of_negatives[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    of_positives[half] = factors.positive[rows[half].i];
    of_negatives[half] = factors.negative[rows[half].i];
  }
  float sums[kSums][2][2][4] = {};

  // Copies what the block works on next: chunks of rows and columns, then wide ones of columns.
  int number = 0;
  const auto copy = [&](int j, int step) {
    if (step == p.chunks + wide) ++j, step = 0;
    if (j == end) return;
    uint4* const stage = stages + number % 2 * kStage;
    const int first = j * kTile;
    if (step < p.chunks) {
      copy_chunk(stage, stage + kMatrix, p, first_i, step);
      copy_chunk(stage + 2 * kMatrix, stage + 3 * kMatrix, p, first, step);
    } else {
      const int chunk = first_chunk + 2 * (step - p.chunks);
      copy_chunk(stage, stage + 2 * kMatrix, p, first, chunk);
      // Where there is none any will do: its sums are not written.
      copy_chunk(stage + kMatrix, stage + 3 * kMatrix, p, first,
                 chunk + 1 < p.chunks ? chunk + 1 : chunk);
    }
    end_copies();
  };
  // The stage that was copied last, when it is there and the one before is no longer read.
  const auto next = [&](int j, int step) {
    wait_for_copies<0>();
    __syncthreads();
    const uint4* const stage = stages + number % 2 * kStage;
    ++number;
    copy(j, step + 1);
    return stage;
  };

  copy(begin, 0);
  for (int j = begin; j < end; ++j) {
    const int first = j * kTile, left = p.patches - first;
    const bool computes = first_i + at.first_row < p.patches && at.first_column < left;
    PairProducts own, cross, truth;
    own.clear(), cross.clear(), truth.clear();
    MGHF_UNROLL(1)
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const uint4* const stage = next(j, chunk);
      const int steps = p.depth - chunk * kChunk > kChunk / 2 ? 2 : 1;
      if (computes) add_chunk<true>(own, cross, truth, stage, at, steps);
    }
    if (computes) {
      own.finish(), cross.finish(), truth.finish();
      const PairMasks masks = positive_pairs(truth.values, rows, first, at, p, gt, t);
      MGHF_UNROLL_ALL
      for (int n = 0; n < kColumnTiles; ++n) {
        MGHF_UNROLL_ALL
        for (int e = 0; e < 4; ++e) {
          const int column = first + at.column + n * 8 + e % 2;
          const uint32_t bit = 1u << (4 * n + e);
          const bool positive = (masks.positives & bit) != 0, is_pair = (masks.pairs & bit) != 0;
          const float exponent = positive ? positive_exponent : negative_exponent;
          const float of_row = positive ? of_positives[e / 2] : of_negatives[e / 2];
          const float of_column = (positive ? factors.positive : factors.negative)[column];
          const float ratio = p.sr_ratio[column], truth_ratio = p.gt_ratio[column];
          const float own_cosine = own.values[n][e] * (rows[e / 2].sr_ratio * ratio);
          const float cross_cosine = cross.values[n][e] * (rows[e / 2].sr_ratio * truth_ratio);
          const float of_sr = exp2f(own_cosine * exponent) * (of_row + of_column) * ratio;
          const float of_gt = exp2f(cross_cosine * exponent) * of_column * (2 * truth_ratio);
          own.values[n][e] = is_pair ? of_sr : 0;
          cross.values[n][e] = is_pair ? of_gt : 0;
        }
      }
      store_factors(of_pairs, own.values, cross.values, at);
    }
    const bool adds = first_i + values.first_row < p.patches;
    MGHF_UNROLL_ALL
    for (int c = 0; c < kSums; ++c) {
      if (c >= wide) continue;
      const uint4* const stage = next(j, p.chunks + c);
      if (adds) add_values(sums[c], of_pairs, stage, values, left > kTile / 2 ? 2 : 1);
    }
  }

  const int padded_depth = p.chunks * kChunk;
  MGHF_UNROLL_ALL
  for (int c = 0; c < kSums; ++c) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 8; ++i) {
      const int m = i / 4, n = i / 2 % 2, half = i % 2;
      const int row = first_i + values.row + m * 16 + half * 8;
      const int d = first_chunk * kChunk + c * kWideChunk + values.value + n * 8;
      if (d >= padded_depth || row >= p.patches) continue;
      float* const to = partial + (static_cast<int64_t>(run) * p.padded + row) * padded_depth + d;
      *reinterpret_cast<float2*>(to) = {sums[c][m][n][2 * half], sums[c][m][n][2 * half + 1]};
    }
  }
}

// ---- from unit patches to patches ----

constexpr int kProjectWarps = kPairThreads / kWarp;

// dS = (ds - s <s, ds>) / max(|S|, floor), with ds the sum over the runs; a patch below the floor
// is divided by a constant, so nothing is projected out. A warp takes a patch.
__global__ void __launch_bounds__(kPairThreads)
    project(Packed p, Matrices sr, TileRuns runs, const float* partial, const float* scale,
            float norm_floor, void* grad_sr) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kProjectWarps + threadIdx.x / kWarp;
  if (i >= p.patches) return;
  const int64_t padded_depth = static_cast<int64_t>(p.chunks) * kChunk;
  const float norm = p.sr_norm[i], floored = norm < norm_floor ? norm_floor : norm;
  const auto gradient = [&](int d) {
    float sum = 0;
    MGHF_UNROLL(4)
    for (int run = 0; run < runs.number; ++run) {
      sum += partial[(static_cast<int64_t>(run) * p.padded + i) * padded_depth + d];
    }
    return sum;
  };
  with_element(sr.element, [&](auto element) {
    using T = decltype(element);
    const Matrix<T> patch = sr.matrix<T>(0);
    T* const to = static_cast<T*>(grad_sr) + i * p.depth;
    float along = 0;
    if (!(norm <= norm_floor)) {
      MGHF_UNROLL(1)
      for (int d = lane; d < p.depth; d += kWarp) along += patch(i, d) / floored * gradient(d);
      MGHF_UNROLL_ALL
      for (int mask = 1; mask < kWarp; mask *= 2) {
        along += __shfl_xor_sync(kAllLanes, along, mask);
      }
    }
    MGHF_UNROLL(1)
    for (int d = lane; d < p.depth; d += kWarp) {
      const float rest = gradient(d) - patch(i, d) / floored * along;
      to[d] = from_float<T>(*scale * rest / floored);
    }
  });
}

}  // namespace

}  // namespace mghf::cuda
