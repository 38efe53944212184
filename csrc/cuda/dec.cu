// DECLoss. With unit patches s, g and E = exp(./t) it needs, for every row i, the sums over its
// positives and its negatives j of E(<s_i, s_j>) + 2 E(<g_i, s_j>). The pairs are visited tile by
// tile and never stored.
//
// The forward has four kernels: the patches, divided by their norms and split into halves; the
// sums of 64 rows over a run of columns; the rows' sums over the runs; the loss. The backward has
// four as well: the patches; the rows' factors; products over a run of columns (dec_gradient.h);
// the sum over the runs and the way back from unit patches.
//
// Predicted floor for P = 4096 patches (512 x 512, B = 1) of D = 192 values on an H200, with
// P^2 D = 3.2 G multiply-adds: three products forward and five backward, each three of halves at
// 600 TFLOP/s, 97 and 161 us, which bounds both; 2 P^2 exponentials, 33.6 M at 16 a cycle of an SM,
// 9 us. The patches take 3 MB each way. A block reads 200 KB a tile of pairs from L2, 0.8 GB in
// all, 0.15 ms at 5.5 TB/s, and the backward half as much more; a block of 8 warps has an SM for
// itself, so 0.2 and 0.35 ms are expected. The sums over runs take some microseconds.
#include "dec.h"

#include "dec_gradient.h"

namespace mghf::cuda {

namespace {

// ---- packing ----

// A warp takes a patch. (Four blocks a multiprocessor: for eight registers would spill.)
__global__ void __launch_bounds__(kPairThreads, 4)
    pack(Matrices sr, Matrices gt, Packed p, float norm_floor) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kProjectWarps + threadIdx.x / kWarp;
  if (i >= p.padded) return;
  const auto take = [&](const Matrices& from, uint4* words, float* norms, float* ratios,
                        float* squares) {
    with_element(from.element, [&](auto element) {
      const auto patch = from.matrix<decltype(element)>(0);
      const auto at = [&](int d) { return i < p.patches && d < p.depth ? patch(i, d) : 0.0f; };
      double squared = 0;
      MGHF_UNROLL(2)
      for (int d = lane; d < p.depth; d += kWarp) {
        const double x = static_cast<double>(at(d));
        squared += x * x;
      }
      MGHF_UNROLL_ALL
      for (int mask = 1; mask < kWarp; mask *= 2) {
        squared += __shfl_xor_sync(kAllLanes, squared, mask);
      }
      const float norm = static_cast<float>(sqrt(squared));
      if (lane == 0) {
        norms[i] = norm;
        ratios[i] = norm / (norm < norm_floor ? norm_floor : norm);  // NaN stays NaN
        if (squares != nullptr) squares[i] = static_cast<float>(squared);
      }
      const auto unit = [&](int d) { return norm == 0 ? 0.0f : at(d) / norm; };
      MGHF_UNROLL(1)
      for (int eight = lane; eight < p.chunks * (kChunk / 8); eight += kWarp) {
        uint32_t big[4], small[4];
        MGHF_UNROLL_ALL
        for (int k = 0; k < 4; ++k) {
          const SplitHalves two(unit(eight * 8 + 2 * k), unit(eight * 8 + 2 * k + 1));
          big[k] = two.big;
          small[k] = two.small;
        }
        uint4* const to =
            words + (i * p.chunks + eight / (kWords / 2)) * kWords + eight % (kWords / 2);
        to[0] = {big[0], big[1], big[2], big[3]};
        to[kWords / 2] = {small[0], small[1], small[2], small[3]};
      }
    });
  };
  take(sr, p.sr, p.sr_norm, p.sr_ratio, nullptr);
  take(gt, p.gt, p.gt_norm, p.gt_ratio, p.gt_squared);
}

// ---- sums over columns ----

// partial: (runs, 2, padded), the sums over positives and over negatives; `some`: (runs, padded),
// whether there are negatives.
__global__ void __launch_bounds__(kPairThreads)
    sums_of_pairs(Packed p, Matrices gt, Thresholds t, TileRuns runs, float positive_exponent,
                  float negative_exponent, float* partial, int* some) {
  MGHF_DYNAMIC_SHARED(uint4, stages);
  __shared__ float sums[2][2][kTile];
  __shared__ int found[2][kTile];
  const int thread = static_cast<int>(threadIdx.x);
  const int block = static_cast<int>(blockIdx.x), tiles = p.tiles();
  const int first_i = block % tiles * kTile, run = block / tiles, begin = run * runs.length;
  const int end = begin + runs.length < tiles ? begin + runs.length : tiles;
  const PairPlace at;
  const PairRow rows[2] = {{p, first_i + at.row}, {p, first_i + at.row + 8}};
  float positives[2] = {}, negatives[2] = {};
  int any[2] = {};

  int number = 0;
  const auto copy = [&](int j, int chunk) {
    if (chunk == p.chunks) ++j, chunk = 0;
    if (j == end) return;
    uint4* const stage = stages + number % 2 * kStage;
    copy_chunk(stage, stage + kMatrix, p, first_i, chunk);
    copy_chunk(stage + 2 * kMatrix, stage + 3 * kMatrix, p, j * kTile, chunk);
    end_copies();
  };
  copy(begin, 0);
  for (int j = begin; j < end; ++j) {
    const int first = j * kTile;
    const bool computes =
        first_i + at.first_row < p.patches && first + at.first_column < p.patches;
    PairProducts own, cross, truth;
    own.clear(), cross.clear(), truth.clear();
    MGHF_UNROLL(1)
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      wait_for_copies<0>();
      __syncthreads();  // also ends the products of the stage that is copied to next
      const uint4* const stage = stages + number % 2 * kStage;
      ++number;
      copy(j, chunk + 1);
      const int steps = p.depth - chunk * kChunk > kChunk / 2 ? 2 : 1;
      if (computes) add_chunk<false>(own, cross, truth, stage, at, steps);
    }
    if (!computes) continue;
    own.finish(), cross.finish(), truth.finish();
    const PairMasks masks = positive_pairs(truth.values, rows, first, at, p, gt, t);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kColumnTiles; ++n) {
      MGHF_UNROLL_ALL
      for (int e = 0; e < 4; ++e) {
        const uint32_t bit = 1u << (4 * n + e);
        const bool positive = (masks.positives & bit) != 0;
        const float exponent = positive ? positive_exponent : negative_exponent;
        const float ratio = p.sr_ratio[first + at.column + n * 8 + e % 2];
        const float own_cosine = own.values[n][e] * (rows[e / 2].sr_ratio * ratio);
        const float cross_cosine = cross.values[n][e] * (rows[e / 2].gt_ratio * ratio);
        const float x = exp2f(own_cosine * exponent) + 2 * exp2f(cross_cosine * exponent);
        const bool is_negative = (masks.pairs & ~masks.positives & bit) != 0;
        positives[e / 2] += positive ? x : 0;
        negatives[e / 2] += is_negative ? x : 0;
        any[e / 2] |= is_negative ? 1 : 0;
      }
    }
  }

  const int lane = thread % kWarp, half = at.first_column / (kColumnTiles * 8);
  MGHF_UNROLL_ALL
  for (int r = 0; r < 2; ++r) {
    MGHF_UNROLL_ALL
    for (int mask = 1; mask < 4; mask *= 2) {
      positives[r] += __shfl_xor_sync(kAllLanes, positives[r], mask);
      negatives[r] += __shfl_xor_sync(kAllLanes, negatives[r], mask);
      any[r] |= __shfl_xor_sync(kAllLanes, any[r], mask);
    }
    if (lane % 4 != 0) continue;
    sums[0][half][at.row + r * 8] = positives[r];
    sums[1][half][at.row + r * 8] = negatives[r];
    found[half][at.row + r * 8] = any[r];
  }
  __syncthreads();
  if (thread >= kTile) return;
  const int64_t to = static_cast<int64_t>(run) * p.padded;
  partial[2 * to + first_i + thread] = sums[0][0][thread] + sums[0][1][thread];
  partial[2 * to + p.padded + first_i + thread] = sums[1][0][thread] + sums[1][1][thread];
  some[to + first_i + thread] = found[0][thread] | found[1][thread];
}

// ---- the loss ----

// A row's sums over the runs, and the logarithm of their ratio.
__global__ void __launch_bounds__(kPairThreads)
    sums_of_rows(const float* partial, const int* some, int runs, int patches, int padded,
                 double offset, float* statistics, double* ratios) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPairThreads + threadIdx.x;
  if (i >= patches) return;
  double positive = 0, negative = 0;
  int found = 0;
  for (int64_t run = 0; run < runs; ++run) {
    positive += static_cast<double>(partial[2 * run * padded + i]);
    negative += static_cast<double>(partial[(2 * run + 1) * padded + i]);
    found |= some[run * padded + i];
  }
  statistics[i] = static_cast<float>(positive);
  statistics[patches + i] = found != 0 ? static_cast<float>(negative) : -1.0f;
  // A row without negatives does not count, but a NaN in it makes the loss NaN.
  ratios[i] = found != 0 ? log(positive) - log(negative) + offset : 0 * log(positive);
}

// By one block, so that the order of the sum is fixed.
__global__ void __launch_bounds__(kPairThreads)
    mean_of_rows(const double* ratios, const float* statistics, int patches, float* loss) {
  __shared__ double totals[kPairThreads];
  __shared__ int counts[kPairThreads];
  const int thread = static_cast<int>(threadIdx.x);
  double total = 0;
  int rows = 0;
  for (int i = thread; i < patches; i += kPairThreads) {
    total += ratios[i];
    rows += statistics[patches + i] != -1.0f ? 1 : 0;
  }
  total = sum_over_block(total, totals);
  rows = sum_over_block(rows, counts);
  if (thread == 0) *loss = static_cast<float>(-total / (rows > 0 ? rows : 1));
}

// ---- workspaces and launches ----

struct ForwardSpace {
  Packed packed;
  TileRuns runs;
  float* partial;
  int* some;
  double* ratios;

  ForwardSpace(const DecOptions& options, Pieces& pieces)
      : packed(options, pieces),
        runs(packed.tiles(), dec_blocks),
        partial(pieces.take<float>(int64_t{2} * runs.number * packed.padded)),
        some(pieces.take<int>(int64_t{1} * runs.number * packed.padded)),
        ratios(pieces.take<double>(packed.padded)) {}
};

struct BackwardSpace {
  Packed packed;
  int sums, slices;  // how many times 64 values a block takes; of blocks for all values
  TileRuns runs;
  RowFactors factors;
  float* partial;

  BackwardSpace(const DecOptions& options, Pieces& pieces)
      : packed(options, pieces),
        sums(packed.chunks <= 2 ? 1 : kMostSums),
        slices((packed.chunks + 2 * sums - 1) / (2 * sums)),
        runs(packed.tiles(), dec_blocks / 2 / slices),
        factors(packed, pieces),
        partial(pieces.take<float>(int64_t{kChunk} * runs.number * packed.padded * packed.chunks)) {
  }
};

template <class Space>
int64_t bytes_of(const DecOptions& options) {
  Pieces pieces;
  const Space space(options, pieces);
  return pieces.bytes();
}

const char* pack_patches(const Packed& p, const Matrices& sr, const Matrices& gt,
                         float norm_floor, Stream stream) {
  return launch(pack, {p.padded / kProjectWarps, kPairThreads}, stream, sr, gt, p, norm_floor);
}

}  // namespace

int dec_blocks = 512;

int64_t dec_workspace_bytes(const DecOptions& options) { return bytes_of<ForwardSpace>(options); }

int64_t dec_backward_workspace_bytes(const DecOptions& options) {
  return bytes_of<BackwardSpace>(options);
}

const char* dec(const DecOptions& options, const Matrices& sr, const Matrices& gt, double offset,
                float* loss, float* statistics, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const ForwardSpace space(options, pieces);
  const Packed& p = space.packed;
  const char* error = pack_patches(p, sr, gt, options.norm_floor, stream);
  if (error != nullptr) return error;
  const Grid pairs{int64_t{1} * p.tiles() * space.runs.number, kPairThreads,
                   2 * kStage * sizeof(uint4)};
  error = launch(sums_of_pairs, pairs, stream, p, gt, Thresholds(options), space.runs,
                 options.positive_exponent, options.negative_exponent, space.partial, space.some);
  if (error != nullptr) return error;
  error = launch(sums_of_rows, {(p.patches + kPairThreads - 1) / kPairThreads, kPairThreads},
                 stream, space.partial, space.some, space.runs.number, p.patches, p.padded, offset,
                 statistics, space.ratios);
  if (error != nullptr) return error;
  return launch(mean_of_rows, {1, kPairThreads}, stream, space.ratios, statistics, p.patches, loss);
}

const char* dec_backward(const DecOptions& options, const DecScales& scales, const float* grad,
                         const Matrices& sr, const Matrices& gt, const float* statistics,
                         void* grad_sr, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const BackwardSpace space(options, pieces);
  const Packed& p = space.packed;
  const char* error = pack_patches(p, sr, gt, options.norm_floor, stream);
  if (error != nullptr) return error;
  error = launch(factors_of_rows, {1, kPairThreads}, stream, grad, statistics, scales,
                 space.factors, p.patches, p.padded);
  if (error != nullptr) return error;
  const Grid pairs{int64_t{1} * p.tiles() * space.runs.number * space.slices, kPairThreads,
                   kGradientBytes};
  error = launch(space.sums == 1 ? gradient_of_pairs<1> : gradient_of_pairs<kMostSums>, pairs,
                 stream, p, gt, Thresholds(options), space.runs, space.factors,
                 options.positive_exponent, options.negative_exponent, space.partial);
  if (error != nullptr) return error;
  return launch(project, {(p.patches + kProjectWarps - 1) / kProjectWarps, kPairThreads}, stream,
                p, sr, space.runs, space.partial, space.factors.scale, options.norm_floor, grad_sr);
}

}  // namespace mghf::cuda
