// Sinkhorn's iterations and the gradient through them, for the kernels of `sinkhorn` and `monce`: a
// block, or a cluster of blocks, solves one matrix in one launch. See
// mghf_fast/reference/sinkhorn.py for the mathematics.
//
// Method. K_ij = 2^(y_ij - a_i - b_j) with y = score / epsilon / ln 2 is built once. An iteration
// is u = 1 / (K v), v = 1 / (K^T u): one sweep over K, in which a warp takes whole rows, a lane
// every 32nd column: it adds up a row's K_ij v_j across the lanes and, the row still in its
// registers, adds u_i K_ij to the column sums it keeps. Those of the warps, then of the cluster's
// blocks, are added in their order: results are the same run after run. plan = u_i K_ij v_j.
//
// Where K lies. Each block of a cluster has n / blocks rows in its shared memory, and the blocks
// read each other's column sums: one barrier of the cluster an iteration, for the sums are kept
// twice. Where K fits no cluster's shared memory, its blocks have their rows and vectors in the
// device's memory, and only the column sums that they exchange in shared memory; without clusters a
// single block has them all. Then the grid has as many clusters as run at a time, and each takes
// matrices in turn, in the same memory; see sinkhorn_streaming.h.
//
// Stability. a and b are integers, so they cost no digits and absorb any scale exactly. Every
// iteration checks that its row and column sums stay within [1e-14, 1e14]: entries of K below
// float32's range then add less than 1e-10 to any entry of the plan. An iteration that fails is
// repeated with a maximum per row and per column (a log-sum-exp in base two), and K is rebuilt on
// the new a and b. epsilon = 1 never needs that; 0.01 may, on widely spread similarities. Exponents
// reach 2^24: longer scores make the matrix NaN, but costs e^s stop there (see cap_of()).
//
// For `monce` the iterations end once further ones would change the result negligibly (see
// sinkhorn_settling.h). The gradient's recursion goes through all iterations, including those that
// were skipped, until what it could still add is negligible.
#pragma once

#include "sinkhorn_problem.h"

#include "../common/sinkhorn_settling.h"  // after the definition of __device__

namespace mghf::cuda {

// The entries of K themselves.
struct Plain {
  __device__ __forceinline__ float operator()(int, int, float x) const { return x; }
};

template <int kColumnWords, bool kOnChip>
struct Solver {
  static constexpr int kWords = kColumnWords;
  static constexpr bool kShared = kOnChip;  // whether the area is in shared memory
  static constexpr int kWidth = kWords * kWarp;

  const Problem& p;
  const int n, pitch, rows, chunks, blocks;
  const int thread, threads, lane, warp, warps;
  const int map, rank;
  const int first;  // row of the matrix that is the block's first
  float *partial, *block_statistics, *all_statistics, *warp_statistics, *warp_ranges;
  float *sums, *v_of, *b_of, *u_of, *a_of, *coefficients;  // two of each but the last
  float* joined;  // the cluster's column sums
  float* of_rows;  // five numbers of each row for `monce`
  float* area;  // the block's rows of the similarities, then, in place, of K
  int turn = 0;

  __device__ __forceinline__ Solver(const Problem& p, float* shared, int map)
      : p(p),
        n(p.n),
        pitch(kOnChip ? kWidth : p.division.pitch()),
        rows(p.division.rows),
        chunks(kOnChip ? 1 : p.division.chunks),
        blocks(blocks_of(p)),
        thread(thread_of_block()),
        threads(static_cast<int>(blockDim.x)),
        lane(thread % kWarp),
        warp(thread / kWarp),
        warps(threads / kWarp),
        map(map),
        rank(static_cast<int>(block_of_cluster())),
        first(rank * rows) {
    if constexpr (kOnChip && kWords > kWordsOfBlock && !kClusters) never();
    partial = shared;
    block_statistics = partial + p.division.partial();
    all_statistics = block_statistics + 16;
    warp_statistics = all_statistics + 8;
    warp_ranges = warp_statistics + 8 * warps;
    float* const rest = warp_ranges + 8 * warps;  // of the shared memory
    float* const own = kOnChip ? rest : p.streamed + blockIdx.x * p.division.streamed();
    sums = kOnChip || blocks > 1 ? rest : own;
    joined = kOnChip ? partial : rest + 2 * pitch;
    v_of = own + 2 * pitch;
    b_of = v_of + 2 * pitch;
    area = b_of + 2 * pitch;
    u_of = area + static_cast<int64_t>(rows) * pitch;
    a_of = u_of + 2 * rows;
    coefficients = a_of + 2 * rows;
    of_rows = coefficients + rows;
  }

  // In the loop over matrices every address depends on it, and none is to be kept in a register.
  __device__ __forceinline__ static int thread_of_block() {
    const int thread = static_cast<int>(threadIdx.x);
    return kOnChip ? thread : opaque(thread);
  }
  __device__ __forceinline__ static int blocks_of(const Problem& p) {
    return kOnChip || kClusters ? p.division.blocks : 1;
  }
  __device__ __forceinline__ float* u(int t) const { return u_of + (t & 1) * rows; }
  __device__ __forceinline__ float* v(int t) const { return v_of + (t & 1) * pitch; }
  __device__ __forceinline__ float* a(int base) const { return a_of + (base & 1) * rows; }
  __device__ __forceinline__ float* b(int base) const { return b_of + (base & 1) * pitch; }
  __device__ __forceinline__ Area own_rows() const { return {area, pitch, rows}; }
  __device__ __forceinline__ float& at(int r, int j) const { return own_rows().at(r, j); }
  __device__ __forceinline__ History history() const {
    const int which = p.keeps_histories ? map : static_cast<int>(blockIdx.x) / blocks;
    return History(p.history + which * p.history_floats, n, p.iterations);
  }

  // A barrier of the blocks that solve a matrix, if there are several, which orders their memory.
  // For a single block its own barriers are enough.
  __device__ __forceinline__ void sync_all() const {
    if (blocks > 1) sync_cluster();
  }

  template <class F>
  __device__ __forceinline__ void for_rows(const F& f) const {
    for_rows_of_warp(rows, f);
  }
  // Calls f(j, entry) for the lane's columns j < n of a row. Of a row in the device's memory some
  // are loaded before the first is used.
  template <int kUnrolled = 2, class F>
  __device__ __forceinline__ void for_columns(int r, const F& f) const {
    if constexpr (kOnChip) {
      MGHF_UNROLL(kUnrolled)
      for (int j = lane; j < n; j += kWarp) f(j, at(r, j));
    } else {
      MGHF_UNROLL(1)
      for (int left = lane; left < n; left += kLoaded * kWarp) {
        float x[kLoaded];
        load_columns(x, &at(r, left));
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) {
          if (left + k * kWarp < n) f(left + k * kWarp, x[k]);
        }
      }
    }
  }

  // ---- K ----

  // Builds K from the similarities in the area, with the exponents a of the block's rows and b.
  __device__ __forceinline__ void build(const float* a, const float* b) const {
    build_kernel<kOnChip>(own_rows(), first, n, a, b, p.cost, p.cap, p.factor.value,
                          p.factor.low);
  }
  __device__ __forceinline__ Power power_of(float similarity) const {
    return power_of_entry(similarity, p.cost, p.cap, p.factor.value, p.factor.low);
  }

  // Puts the rows' rounded maxima of y into a; the statistics show if any y is infinite, NaN or too
  // large, or if a row has none but those of capped costs, whose differences are lost.
  __device__ __forceinline__ void find_exponents(float* a, Statistics& statistics) const {
    bool bad = false;
    const float capped = p.cost == TransportCost::exp
                             ? score_of(p.cap, p.cost, p.cap) * p.factor.value
                             : -INFINITY;
    for_rows([&](int r) {
      if (first + r >= n) return;
      float top = -INFINITY;
      for_columns(r, [&](int j, float x) {
        const float y = score_of(x, p.cost, p.cap) * p.factor.value;
        if (j == first + r) return;
        bad = bad || !(x < INFINITY && fabsf(y) < kMostExponent);
        top = most_of(top, y);
      });
      top = across_lanes(top, Most{});
      bad = bad || (n > 1 && top <= capped);
      if (lane == 0) a[r] = integer_near(top);
    });
    if (across_lanes(bad ? 1.0f : 0.0f, Most{}) > 0) statistics.total = 1;
  }

  // ---- sweeps ----

  // With r_i = sum_j x_ij weights_j and c = coefficient(row of the block, r_i), adds up c x_ij over
  // the block's rows; x_ij = entry(row of the block, j, K_ij). The coefficient must be the same in
  // all lanes. finish() writes the statistics once the coefficients are known.
  template <int kRows = kOnChip ? kGroup : 1, class Entry, class Coefficient, class Finish>
  __device__ __forceinline__ void sweep(const float* weights, const Entry& entry,
                                        const Coefficient& coefficient, const Finish& finish) {
    if (chunks > 1) {
      sweep_chunks(weights, entry, coefficient, finish);
      return;
    }
    float weight[kWords], total[kWords];
    MGHF_UNROLL_ALL
    for (int k = 0; k < kWords; ++k) {
      weight[k] = weights[lane + k * kWarp];
      total[k] = 0;
    }
    // The warp's rows, as in for_rows(), some at a time; the next rows' entries are loaded while
    // the lanes add up these, where registers allow.
    constexpr int kSteps = kGroup / kRows;
    constexpr bool kAhead = kOnChip && kRows == kGroup && kWords <= 14;
    const int next = warps * kGroup - (kGroup - kRows);
    float loaded[kRows][kWords];
    const auto load = [&](int r) {
      MGHF_UNROLL_ALL
      for (int g = 0; g < kRows; ++g) {
        const float* const entries = &at(r + g, lane);
        MGHF_UNROLL_ALL
        for (int k = 0; k < kWords; ++k) loaded[g][k] = entries[k * kWarp];
      }
    };
    if (kAhead) load(warp * kGroup);
    MGHF_UNROLL(1)
    for (int step = 1, r = warp * kGroup; r < rows; ++step) {
      if (!kAhead) load(r);
      float x[kRows][kWords], sum[kRows];
      MGHF_UNROLL_ALL
      for (int g = 0; g < kRows; ++g) {
        sum[g] = 0;
        MGHF_UNROLL_ALL
        for (int k = 0; k < kWords; ++k) {
          x[g][k] = entry(r + g, lane + k * kWarp, loaded[g][k]);
          sum[g] += x[g][k] * weight[k];
        }
      }
      const int now = r;
      r += step % kSteps ? kRows : next;
      if (kAhead && r < rows) load(r);
      MGHF_UNROLL_ALL
      for (int g = 0; g < kRows; ++g) {
        const float c = coefficient(now + g, across_lanes(sum[g], Add{}));
        MGHF_UNROLL_ALL
        for (int k = 0; k < kWords; ++k) total[k] += c * x[g][k];
      }
    }
    finish();
    MGHF_UNROLL_ALL
    for (int k = 0; k < kWords; ++k) partial[warp * kWidth + lane + k * kWarp] = total[k];
    join_warps<Add>(0);
  }

  // The same for rows of several chunks.
  template <class Entry, class Coefficient, class Finish>
  __device__ __forceinline__ void sweep_chunks(const float* weights, const Entry& entry,
                                               const Coefficient& coefficient,
                                               const Finish& finish);

  // Combines f(total, row of the block, j, the area's entry) over the block's rows. On chip few
  // matrices need it, so the loop is kept short, with few columns at a time.
  template <class Combine, class F>
  __device__ __forceinline__ void sweep_columns(const F& f) {
    constexpr int kTogether = !kOnChip ? kWords : kWords % 7 == 0 ? 7 : 4;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      MGHF_UNROLL(1)
      for (int word = 0; word < kWords; word += kTogether) {
        const int left = word * kWarp + lane;  // column of the chunk
        float total[kTogether];
        MGHF_UNROLL_ALL
        for (int k = 0; k < kTogether; ++k) total[k] = Combine::kNothing;
        for_rows([&](int r) {
          if (first + r >= n) return;
          MGHF_UNROLL_ALL
          for (int k = 0; k < kTogether; ++k) {
            const int j = chunk * kWidth + left + k * kWarp;
            total[k] = f(total[k], r, j, at(r, j));
          }
        });
        MGHF_UNROLL_ALL
        for (int k = 0; k < kTogether; ++k) partial[warp * kWidth + left + k * kWarp] = total[k];
      }
      join_warps<Combine>(chunk);
      if (chunks > 1) __syncthreads();
    }
  }

  template <class Combine>
  __device__ __forceinline__ void join_warps(int chunk) {
    join_warps_of_block<Combine>(partial, kWidth, sums + turn * pitch + chunk * kWidth);
  }

  // Writes the warp's statistics, which lane 0 has; called before a sweep's column sums.
  __device__ __forceinline__ void write_statistics(const Statistics& own) const {
    if (lane != 0) return;
    float* const to = warp_statistics + 8 * warp;
    to[0] = own.least;
    to[1] = own.most;
    to[2] = own.low;
    to[3] = own.high;
    to[4] = own.total;
  }

  // After a sweep: calls use(j, sum, changes) for the columns of the thread; use returns a number
  // and may give `changes` another. Returns the ranges of the numbers for j < n. The statistics
  // become those of the whole matrix.
  template <class Combine, class Use>
  __device__ __forceinline__ Ranges exchange(Statistics& statistics, const Use& use) {
    const float* const totals =
        join_blocks<Combine>(warp_statistics, block_statistics + turn * 8, all_statistics,
                             sums + turn * pitch, joined, pitch, blocks);
    Ranges ranges;
    MGHF_UNROLL(2)
    for (int j = thread; j < pitch; j += threads) {
      const float number = use(j, totals[j], ranges.changes);
      if (j < n) ranges.numbers.take(number);
    }
    ranges = ranges_of_block(ranges, warp_ranges);
    statistics = {all_statistics[0], all_statistics[1], all_statistics[2], all_statistics[3],
                  all_statistics[4]};
    turn ^= 1;
    return ranges;
  }

  // ---- the iterations ----

  struct Progress {
    bool right;          // the sums are in the safe range
    float error, spread;  // error of the previous iterate, spread of the changes of v
    bool hopeless;
    bool even;  // v has no wide range
  };

  __device__ __forceinline__ static Progress progress_of(const Statistics& all,
                                                         const Ranges& ranges) {
    const Range& columns = ranges.numbers;
    const float least = least_of(all.least, columns.least);
    const float most = most_of(all.most, columns.most);
    const float above = all.high - 1, below = 1 - all.low;
    return {least >= kSmallestSum && most <= kLargestSum, most_of(above, below),
            ranges.changes.most - ranges.changes.least, all.total > 0, columns.most <= 1e6f * columns.least};
  }

  __device__ __forceinline__ void keep_u(float value, int t, int r) const {
    if (lane != 0) return;
    u(t)[r] = value;
    if (p.history != nullptr) history().u(t)[first + r] = value;
  }
  __device__ __forceinline__ void keep_v(float value, int t, int j) const {
    v(t)[j] = j < n ? value : 0;
    if (p.history != nullptr && rank == 0 && j < n) history().v(t)[j] = value;
  }
  // Stores the exponents of a base for the gradient; every thread stores those that it wrote, or
  // that will not change.
  __device__ __forceinline__ void keep_base(int base) const {
    if (p.history == nullptr) return;
    for_rows([&](int r) {
      if (lane == 0 && first + r < n) history().a(base)[first + r] = a(base)[r];
    });
    if (rank != 0) return;
    for (int j = thread; j < n; j += threads) history().b(base)[j] = b(base)[j];
  }

  // Iteration t in the exponential domain.
  __device__ __forceinline__ Progress iterate_fast(int t, float trouble) {
    Statistics statistics;
    statistics.total = trouble;
    const float* const old_u = u(t - 1);
    sweep(
        v(t - 1), Plain{},
        [&](int r, float sum) {
          if (first + r >= n) return 0.0f;
          const float change = old_u[r] * sum, new_u = 1 / sum;
          statistics.least = least_of(statistics.least, sum);
          statistics.most = most_of(statistics.most, sum);
          statistics.low = least_of(statistics.low, change);
          statistics.high = most_of(statistics.high, change);
          keep_u(new_u, t, r);
          return new_u;
        },
        [&] { write_statistics(statistics); });
    const Ranges ranges = exchange<Add>(statistics, [&](int j, float sum, Range& changes) {
      if (j < n) changes.take(v(t - 1)[j] * sum);
      keep_v(1 / sum, t, j);
      return sum;
    });
    return progress_of(statistics, ranges);
  }

  // v 2^-b as a power of two and a mantissa of 1 to 2.
  __device__ __forceinline__ static Power split(float v, float b) {
    const uint32_t bits = bits_as<uint32_t>(v);
    return {static_cast<float>(static_cast<int>(bits >> 23) - 127) - b,
            bits_as<float>((bits & 0x7fffff) | 0x3f800000)};
  }

  // The first half of iteration t with the maximum exponent of every row and column factored out,
  // from the exponents a and b of a base: u, and the exponents of the next base.
  template <class Source>
  __device__ __forceinline__ Progress iterate_rows(const Source& source, int t, int base) {
    source.fill(*this);
    Statistics statistics;
    float* const new_a = a(base + 1);
    const auto power_at = [&](int r, int j) {
      const Power own = power_of(at(r, j));
      const Power column = split(v(t - 1)[j], b(base)[j]);
      return j == first + r ? Power{kNoExponent, 0}
                            : Power{own.exponent + column.exponent, own.power * column.power};
    };
    for_rows([&](int r) {
      if (first + r >= n) return;
      float top = 2 * kNoExponent, sum = 0;
      MGHF_UNROLL(1)
      for (int j = lane; j < n; j += kWarp) top = most_of(top, power_at(r, j).exponent);
      top = across_lanes(top, Most{});
      MGHF_UNROLL(1)
      for (int j = lane; j < n; j += kWarp) {
        const Power x = power_at(r, j);
        sum += x.power * scale(x.exponent - top);
      }
      sum = across_lanes(sum, Add{});
      const float change = u(t - 1)[r] * sum * scale(top - a(base)[r]);
      statistics.low = least_of(statistics.low, change);
      statistics.high = most_of(statistics.high, change);
      if (lane == 0) new_a[r] = top;
      keep_u(1 / sum, t, r);
    });
    write_statistics(statistics);
    __syncwarp();
    sweep_columns<Most>([&](float top, int r, int j, float similarity) {
      if (j >= n || j == first + r) return top;
      return most_of(top, power_of(similarity).exponent - new_a[r]);
    });
    exchange<Most>(statistics, [&](int j, float top, Range&) { return b(base + 1)[j] = top; });
    return progress_of(statistics, {{1, 1}, {1, 1}});
  }

  // The second half: v, after which K has the new base.
  __device__ __forceinline__ void iterate_columns(int t, int new_base) {
    build(a(new_base), b(new_base));
    keep_base(new_base);
    Statistics none;
    write_statistics(none);
    sweep_columns<Add>(
        [&](float total, int r, int, float x) { return total + u(t)[r] * x; });
    exchange<Add>(none, [&](int j, float sum, Range&) {
      keep_v(1 / sum, t, j);
      return sum;
    });
  }

  // The result of the iterations: how many were made, -1 if the similarities cannot be handled; the
  // number for which it is valid; K's base.
  struct Solution {
    int made, stands_for, base;
    bool even;  // K has the first base, and v has no wide range
  };

  // Stores iterate t for the backward. The threads that wrote it in keep_u() and keep_v() do this.
  __device__ __forceinline__ void leave(int t) const {
    if (t > p.kept.slots) return;
    const KeptIterates kept = p.kept.of_map(map, n);
    for_rows([&](int r) {
      if (lane == 0 && first + r < n) kept.vector(t, 0, n)[first + r] = u(t)[r];
    });
    if (rank != 0) return;
    for (int j = thread; j < n; j += threads) kept.vector(t, 1, n)[j] = v(t)[j];
  }
  // Completes the stored state: the number of iterates, and zeros in the unused rows.
  __device__ __forceinline__ void finish_leaving(const Solution& solution) const {
    if (rank != 0) return;
    const KeptIterates kept = p.kept.of_map(map, n);
    const int left = solution.base == 0 && solution.made > 0 ? solution.made : 0;
    const int made = left <= kept.slots ? left : 0;
    for (int j = thread; j < n; j += threads) kept.rows[j] = j == 0 ? made : 0;
    for (int t = 1; t <= kept.slots; ++t) {
      for (int which = t <= left ? 2 : 0; which < 4; ++which) {
        for (int j = thread; j < n; j += threads) kept.vector(t, which, n)[j] = 0;
      }
    }
  }

  // The number of stored iterates; 0 if the iterations must be repeated.
  __device__ __forceinline__ int left() const {
    const int made = p.kept.of_map(map, n).made();
    return made < 1 || made > p.kept.slots ? 0 : made;
  }
  // The result of solve(), from the stored iterates.
  __device__ __forceinline__ Solution resume(int made) {
    const KeptIterates kept = p.kept.of_map(map, n);
    for (int t = 1; t <= made; ++t) {
      for_rows([&](int r) {
        if (first + r < n) keep_u(kept.vector(t, 0, n)[first + r], t, r);
      });
      for (int j = thread; j < pitch; j += threads) {
        keep_v(j < n ? kept.vector(t, 1, n)[j] : 0, t, j);
      }
      if (p.history != nullptr && rank == 0 && thread == 0) history().base(t) = 0;
    }
    Ranges ranges;
    for (int j = thread; j < n; j += threads) ranges.numbers.take(v(made)[j]);
    ranges = ranges_of_block(ranges, warp_ranges);
    return {made, p.iterations, 0, ranges.numbers.most <= 1e6f * ranges.numbers.least};
  }

  // Sets the iterate before the first, and K with the first base. The statistics show similarities
  // that cannot be handled.
  template <class Source>
  __device__ __forceinline__ Statistics start(const Source& source) {
    for (int r = thread; r < rows; r += threads) u(0)[r] = 1;
    for (int j = thread; j < pitch; j += threads) {
      keep_v(1, 0, j);
      b(0)[j] = 0;
    }
    source.fill(*this);
    Statistics statistics;
    find_exponents(a(0), statistics);
    __syncwarp();
    build(a(0), b(0));
    keep_base(0);
    return statistics;
  }

  // Runs the iterations. source.fill(solver) puts the similarities of the block's rows into the
  // area, which no thread uses any more, and ends with a barrier of the block. Those on the
  // diagonal do not matter. Stores iterates for a backward if `leaving`, and takes those of a
  // forward if `resuming`. It is one function because its code is long, and a kernel should contain
  // it once.
  template <class Source>
  __device__ __forceinline__ Solution solve(const Source& source, bool leaving,
                                            bool resuming = false) {
    const Statistics statistics = start(source);
    if (const int made = resuming ? left() : 0; made > 0) return resume(made);
    int base = 0;
    bool even = false;
    Settling settling;
    for (int t = 1; t <= p.iterations; ++t) {
      Progress progress = iterate_fast(t, t == 1 ? statistics.total : 0);
      if (progress.hopeless) return {-1, 0, 0, false};
      const bool fast = progress.right;
      if (!fast) progress = iterate_rows(source, t, base);
      // The error is that of iterate t - 1; the first iteration has none.
      if (p.tolerance >= 0 && t > 1 && progress.error <= p.tolerance) {
        if (!fast) build(a(base), b(base));
        return {t - 1, t - 1, base, false};
      }
      if (!fast) iterate_columns(t, ++base);
      if (p.history != nullptr && rank == 0 && thread == 0) history().base(t) = base;
      even = base == 0 && progress.even;
      if (base > 0) continue;
      if (leaving) leave(t);
      if (p.settle && settling.settled(t, progress.spread)) {
        return {t, p.iterations, base, progress.even};
      }
    }
    return {p.iterations, p.iterations, base, even};
  }

  // ---- the gradient ----

  // The gradient of log plan, W, is summed over the columns into df, over the rows into dg:
  // numbers of the block's rows and of all columns, in place of what only the iterations need.
  __device__ __forceinline__ float* df() const { return a_of; }
  __device__ __forceinline__ float* dg() const { return b_of; }
  __device__ __forceinline__ float* weights() const { return b_of + pitch; }

  // Takes the sums of W, whose entry(row of the block, j, K_ij) are those of j < n and zero beyond.
  // The statistics' total becomes the sum of their magnitudes.
  template <class Entry>
  __device__ __forceinline__ void sum_gradient(Statistics& statistics, const Entry& entry);

  // The recursion from df and dg, iteration by iteration:
  //   B = u K v:  df -= B dg;  A = u K v of the iteration before:  dg = -A^T df, df = 0.
  // Stores the terms in the history. It ends when the deviations of dg from its mean add up to less
  // than `negligible` over the remaining iterations: A and B are averages, so the sum of |dg| never
  // grows, and an equal dg in all columns cancels.
  template <class Source>
  __device__ __forceinline__ void recur(const Source& source, const Solution& solution,
                                        float negligible);

  __device__ __forceinline__ static int base_of(const History& h, int t) {
    return t == 0 ? 0 : h.base(t);
  }
};

// Calls f with the solver's type for the division.
template <class F>
const char* with_solver(const Division& division, const F& f) {
  const auto of = [&](auto words, auto on_chip) {
    return f(static_cast<Solver<decltype(words)::value, decltype(on_chip)::value>*>(nullptr));
  };
  constexpr std::true_type on_chip{};
  constexpr std::false_type streamed{};
  if (!division.on_chip) {
    return of(std::integral_constant<int, kStreamedWords>{}, streamed);
  }
  switch (division.words) {
    case 4:
      return of(std::integral_constant<int, 4>{}, on_chip);
    case 8:
      return of(std::integral_constant<int, 8>{}, on_chip);
    case 14:
      return of(std::integral_constant<int, 14>{}, on_chip);
    default:
      return of(std::integral_constant<int, 20>{}, on_chip);
  }
}

}  // namespace mghf::cuda
