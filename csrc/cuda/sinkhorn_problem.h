// The problem that the kernels of `sinkhorn` and `monce` solve: the division of a matrix among
// blocks, its memory, and the steps that a block's threads take together. See sinkhorn_solver.h.
#pragma once

#include "powers.h"
#include "sinkhorn.h"

namespace mghf::cuda {

constexpr int kMostWarps = 8;
constexpr int kGroup = 2;  // rows that a warp takes at a time, where registers allow
constexpr float kSmallestSum = 1e-14f, kLargestSum = 1e14f;
constexpr float kLargestExponent = 4194304.0f;  // 2^22: round_to_integer() is right up to there
constexpr float kMostExponent = 16777216.0f;    // 2^24: float32 has all integers up to there
constexpr float kNoExponent = -1e12f;

// Minimum of the numbers that products stage in the memory of the warps' column sums.
constexpr int kStaged = 512;

// How a matrix is divided among the blocks, warps and lanes that solve it.
struct Division {
  int words;    // columns of a lane at a time
  bool on_chip;
  int blocks;   // of a cluster
  int64_t clusters;  // of the grid, which take matrices in turn
  int rows;     // of a block, whole groups
  int warps;
  int chunks;   // of 32 * words columns
  __host__ __device__ int pitch() const { return chunks * words * kWarp; }
  // Numbers stored beside K: vectors of rows and of columns.
  __host__ __device__ int64_t vectors() const { return 6 * pitch() + 10 * rows; }
  // Numbers of the warps' column sums and of the statistics, always in shared memory, and of what
  // the blocks of a cluster that streams a matrix tell each other: two sums and their total.
  __host__ __device__ int exchanged() const {
    return partial() + 24 + 16 * warps + (!on_chip && blocks > 1 ? 3 * pitch() : 0);
  }
  __host__ __device__ int partial() const {
    const int sums = warps * words * kWarp;
    return sums > kStaged ? sums : kStaged;
  }
  __host__ __device__ int64_t area() const { return static_cast<int64_t>(rows) * pitch(); }

  size_t shared_bytes() const {
    const int64_t numbers = exchanged() + (on_chip ? vectors() + area() : 0);
    return static_cast<size_t>(numbers) * sizeof(float);
  }
  // Numbers of a block in the device's memory.
  __host__ __device__ int64_t streamed() const { return on_chip ? 0 : vectors() + area(); }

  Grid grid() const {
    return {clusters * blocks, warps * kWarp, shared_bytes(), static_cast<unsigned>(blocks)};
  }
};

inline Division divided(int64_t n, int words, bool on_chip, int blocks) {
  Division d{words, on_chip, blocks, 0, 0, 0, 0};
  const int64_t rows = (n + blocks - 1) / blocks, width = words * kWarp;
  d.rows = static_cast<int>((rows + kGroup - 1) / kGroup * kGroup);
  d.warps = d.rows / kGroup < kMostWarps ? d.rows / kGroup : kMostWarps;
  d.chunks = static_cast<int>((n + width - 1) / width);
  return d;
}

// A matrix with more columns does not fit a single block's shared memory.
constexpr int kWordsOfBlock = 8;

// Columns of a lane at a time in the kernels for matrices that do not fit on chip.
constexpr int kStreamedWords = 14;

// The fewest clusters that solve that many matrices in as many rounds as all that run at a time.
inline int64_t clusters_for(int64_t batch, int64_t running) {
  if (running < 1) return 1;
  const int64_t rounds = (batch + running - 1) / running;
  return rounds < 1 ? 1 : (batch + rounds - 1) / rounds;
}

// `streaming` is the kernel for matrices that do not fit on chip. Its clusters are as large as
// there is room for, and no more than run at a time, so that few of their areas take memory.
inline const char* divide(int64_t n, int64_t batch, const void* streaming, Division& division) {
  Gpu gpu;
  const char* error = current_gpu(gpu);
  if (error != nullptr) return error;
  for (const int words : {4, 8, 14, 20}) {
    if (n > words * kWarp) continue;
    if (words > kWordsOfBlock && !gpu.clusters) break;
    for (int blocks = 1; blocks <= (gpu.clusters ? 8 : 1); blocks *= 2) {
      division = divided(n, words, true, blocks);
      division.clusters = batch;
      if (static_cast<int64_t>(division.shared_bytes()) <= gpu.shared_bytes) return nullptr;
    }
    break;
  }
  for (int blocks = gpu.clusters ? 8 : 1; blocks >= 1; blocks /= 2) {
    division = divided(n, kStreamedWords, false, blocks);
    const bool fits = static_cast<int64_t>(division.shared_bytes()) <= gpu.shared_bytes;
    if (!fits && blocks > 1) continue;
    int64_t clusters = 0;
    error = running_at_a_time(streaming, division.grid(), clusters);
    if (error != nullptr) return error;
    if (clusters < 1 && blocks > 1) continue;
    division.clusters = clusters_for(batch, clusters);
    return nullptr;
  }
  return nullptr;
}

// The iterates of one matrix in device memory, for the gradient.
struct History {
  float* numbers;
  int* counts;
  int64_t n, slots;  // slots: iterations + 2

  static int64_t floats(int64_t n, int64_t iterations) {
    return (iterations + 2) * (6 * n + 1) + 4;
  }
  __device__ History(float* memory, int64_t n, int64_t iterations)
      : numbers(memory),
        counts(reinterpret_cast<int*>(memory + (iterations + 2) * 6 * n)),
        n(n),
        slots(iterations + 2) {}

  // u after iteration t.
  __device__ float* u(int t) const { return numbers + t * n; }
  __device__ float* v(int t) const { return numbers + (slots + t) * n; }
  __device__ int& base(int t) const { return counts[4 + t]; }
  // The exponents of one of K's bases.
  __device__ float* a(int base) const { return numbers + (2 * slots + base) * n; }
  __device__ float* b(int base) const { return numbers + (3 * slots + base) * n; }
  // Per term of the gradient: v dg, the weights of the columns, and u df, those of the rows. An
  // iteration's term has its number; the sum of the terms after the last one made has the next.
  __device__ float* columns(int term) const { return numbers + (4 * slots + term) * n; }
  __device__ float* rows(int term) const { return numbers + (5 * slots + term) * n; }
  // The number of iterations made (-1: impossible); the first and the last term.
  __device__ int& made() const { return counts[0]; }
  __device__ int& first() const { return counts[1]; }
  __device__ int& last() const { return counts[2]; }
};

// The state that the forward of `monce` saves for its backward: rows of n numbers for each map. The
// first row holds the number of iterations made, 0 if the backward has to repeat them. Then each of
// the first iterations has four rows: u, v, and two for other backends.
struct KeptIterates {
  int* rows = nullptr;
  int slots = 0;

  __host__ __device__ int64_t numbers(int64_t n) const { return (1 + 4 * int64_t{slots}) * n; }
  __device__ KeptIterates of_map(int64_t map, int64_t n) const {
    return {rows + map * numbers(n), slots};
  }
  __device__ int& made() const { return rows[0]; }
  __device__ float* vector(int t, int which, int64_t n) const {
    return reinterpret_cast<float*>(rows + (1 + 4 * (t - 1) + which) * n);
  }
};

struct Problem {
  int n, iterations;
  TransportCost cost;
  float tolerance;  // below 0: none
  bool settle;      // stop where further iterations would change the result negligibly
  Factor factor;    // score to exponent of two
  float cap;        // of similarities under the cost "exp"
  Division division;
  float* streamed;  // K and vectors of each block, where they are not on chip
  float* history;   // null unless the gradient is wanted
  int64_t history_floats;
  bool keeps_histories;  // of all matrices, not only of those that are solved at a time
  KeptIterates kept;  // of all maps; none for plans
};

// The similarity at which a cost e^s, in exponents of two, is nearly kMostExponent. Higher ones
// count as this much: entries of the plan with such a cost are 0 whatever it is, unless rows or
// columns have no others. Then the last place of s alone changes the entry by powers of two.
inline float cap_of(double epsilon) {
  const double cap = log(kMostExponent * epsilon / 1.4426950408889634);
  return nextafterf(static_cast<float>(cap < 88 ? cap : 88), -INFINITY);
}

// `histories`: how many the workspace has: one for each cluster, or for each matrix; 0 forward.
inline Problem problem_of(int64_t n, const TransportOptions& options, const Division& division,
                          bool settle, int64_t histories, void* workspace,
                          KeptIterates kept = {}) {
  float* const memory = static_cast<float*>(workspace);
  return {static_cast<int>(n),
          static_cast<int>(options.iterations),
          options.cost,
          options.has_tolerance ? options.tolerance : -1,
          settle,
          Factor((options.cost == TransportCost::easy ? -1 : 1) * 1.4426950408889634 /
                 options.epsilon),
          cap_of(options.epsilon),
          division,
          memory,
          histories > 0 ? memory + division.grid().blocks * division.streamed() : nullptr,
          histories > 0 ? History::floats(n, options.iterations) : 0,
          histories > division.clusters,
          kept};
}

inline int64_t solver_bytes(int64_t n, int64_t iterations, int64_t histories,
                            const Division& division) {
  const int64_t numbers = division.grid().blocks * division.streamed() +
                          histories * History::floats(n, iterations);
  return numbers * static_cast<int64_t>(sizeof(float));
}

// The block's rows, which hold the similarities and K in turn. Groups of four columns are permuted
// by row, so that there are no bank conflicts, neither along a row nor among a tensor core's
// operands of 8 rows and 4 columns.
struct Area {
  float* numbers;
  int pitch, rows;

  __device__ __forceinline__ float& at(int r, int j) const {
    return numbers[static_cast<int64_t>(r) * pitch + (j ^ (r & 7) * 4)];
  }
};

// Calls f(r) for the warp's share of that many rows.
template <class F>
__device__ __forceinline__ void for_rows_of_warp(int rows, const F& f) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  MGHF_UNROLL(1)
  for (int r = warp * kGroup; r < rows; r += warps * kGroup) {
    MGHF_UNROLL(1)
    for (int g = 0; g < kGroup; ++g) f(r + g);
  }
}

// The score that the plan maximises, without a constant, which u absorbs, and without its sign,
// which the factor has.
__device__ __forceinline__ float score_of(float similarity, TransportCost cost, float cap) {
  return cost == TransportCost::exp ? -exponential(similarity, cap) : similarity;
}
// Its derivative.
__device__ __forceinline__ float slope_of(float similarity, TransportCost cost, float cap) {
  if (cost != TransportCost::exp) return 1;
  return similarity > cap ? 0 : -exponential(similarity, cap);
}

__device__ __forceinline__ float least_of(float x, float y) { return y < x ? y : x; }
__device__ __forceinline__ float most_of(float x, float y) { return y > x ? y : x; }

// Over the rows: minimum and maximum row sum, minimum and maximum change of u, and a sum.
constexpr int kStatistics = 5;
struct Statistics {
  float least = 1, most = 1, low = INFINITY, high = -INFINITY, total = 0;
};
struct Range {
  float least, most;

  // Ignores NaN.
  __device__ __forceinline__ void take(float x) {
    least = least_of(least, x);
    most = most_of(most, x);
  }
};
// The ranges of the results of a sweep's column sums, and of their changes.
struct Ranges {
  Range numbers{INFINITY, -INFINITY}, changes{INFINITY, -INFINITY};
};

__device__ __forceinline__ float combined(int statistic, float x, float y) {
  return statistic == 4 ? x + y : statistic % 2 == 0 ? least_of(x, y) : most_of(x, y);
}

struct Add {
  static constexpr float kNothing = 0;
  __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};
struct Most {
  static constexpr float kNothing = 2 * kNoExponent;
  __device__ __forceinline__ float operator()(float x, float y) const { return most_of(x, y); }
};

// Columns of a row in the device's memory that a lane loads before it uses the first; a pitch has
// whole numbers of them.
constexpr int kLoaded = 7;
template <int kCount>
__device__ __forceinline__ void load_columns(float (&x)[kCount], const float* row) {
  MGHF_UNROLL_ALL
  for (int k = 0; k < kCount; ++k) x[k] = row[k * kWarp];
}

// Not inlined, because kernels call them in several places. Builds K from the similarities in the
// area, whose first row is the matrix's row `first`, with the exponents a of the area's rows and b.
template <bool kOnChip>
__device__ MGHF_NOINLINE void build_kernel(Area area, int first, int n, const float* a,
                                           const float* b, TransportCost cost, float cap,
                                           float factor, float factor_low) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for_rows_of_warp(area.rows, [&](int r) {
    const int i = first + r;
    const float exponent = i < n ? a[r] : 0;
    const auto built = [&](int j, float similarity) {
      if (i >= n || j >= n || j == i) return 0.0f;
      const Power power = power_of_two(score_of(similarity, cost, cap), factor, factor_low);
      return power.power * scale(power.exponent - exponent - b[j]);
    };
    if constexpr (kOnChip) {
      MGHF_UNROLL(4)
      for (int j = lane; j < area.pitch; j += kWarp) area.at(r, j) = built(j, area.at(r, j));
    } else {
      MGHF_UNROLL(1)
      for (int left = lane; left < area.pitch; left += kLoaded * kWarp) {
        float x[kLoaded];
        float* const row = &area.at(r, left);
        load_columns(x, row);
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) x[k] = built(left + k * kWarp, x[k]);
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) row[k * kWarp] = x[k];
      }
    }
  });
}
// An entry's power before the exponents are factored out, for iterations that few matrices need.
inline __device__ MGHF_NOINLINE Power power_of_entry(float similarity, TransportCost cost,
                                                     float cap, float factor,
                                                     float factor_low) {
  return power_of_two(score_of(similarity, cost, cap), factor, factor_low);
}

// Combines the lanes' numbers; every lane gets the result.
template <class Combine>
__device__ __forceinline__ float across_lanes(float x, const Combine& combine) {
  MGHF_UNROLL_ALL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = combine(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}

// A block's column sums from those of its warps, which are contiguous.
template <class Combine>
__device__ MGHF_NOINLINE void join_warps_of_block(const float* of_warps, int width, float* sums) {
  const int threads = static_cast<int>(blockDim.x);
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < width; j += threads) {
    float total = of_warps[j];
    for (int w = 1; w < threads / kWarp; ++w) total = Combine{}(total, of_warps[w * width + j]);
    sums[j] = total;
  }
}

// Joins the statistics (8 numbers apart) of all warps of a cluster's blocks, and their column sums,
// in their order: statistics into `all`; returns where each thread finds the sums of its own
// columns, which may be `joined`.
template <class Combine>
__device__ MGHF_NOINLINE const float* join_blocks(const float* of_warps, float* own, float* all,
                                                  float* sums, float* joined, int pitch,
                                                  int blocks) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (thread < kStatistics) {
    float x = of_warps[thread];
    for (int w = 1; w < threads / kWarp; ++w) x = combined(thread, x, of_warps[8 * w + thread]);
    own[thread] = x;
    if (blocks == 1) all[thread] = x;
  }
  if (blocks == 1) return sums;
  sync_cluster();
  const auto rank = [](int r) { return static_cast<unsigned>(r); };
  if (thread < kStatistics) {
    float x = *of_block(own + thread, 0);
    for (int r = 1; r < blocks; ++r) x = combined(thread, x, *of_block(own + thread, rank(r)));
    all[thread] = x;
  }
  MGHF_UNROLL(2)
  for (int j = thread; j < pitch; j += threads) {
    float total = *of_block(sums + j, 0);
    for (int r = 1; r < blocks; ++r) total = Combine{}(total, *of_block(sums + j, rank(r)));
    joined[j] = total;
  }
  return joined;
}

// The ranges of all threads' numbers. A barrier of the block.
inline __device__ MGHF_NOINLINE Ranges ranges_of_block(Ranges own, float* of_warps) {
  // Maxima all of them, which makes the code short.
  float most[4] = {-own.numbers.least, own.numbers.most, -own.changes.least, own.changes.most};
  MGHF_UNROLL(1)
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < 4; ++k) most[k] = most_of(most[k], __shfl_xor_sync(~0u, most[k], mask));
  }
  if (threadIdx.x % kWarp == 0) {
    float* const to = of_warps + 8 * (static_cast<int>(threadIdx.x) / kWarp);
    MGHF_UNROLL_ALL
    for (int k = 0; k < 4; ++k) to[k] = most[k];
  }
  __syncthreads();
  MGHF_UNROLL(1)
  for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < 4; ++k) most[k] = most_of(most[k], of_warps[8 * w + k]);
  }
  return {{-most[0], most[1]}, {-most[2], most[3]}};
}

}  // namespace mghf::cuda
