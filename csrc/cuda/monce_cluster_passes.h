// The passes of `monce` by a cluster through a map: an iteration, the losses with the weights'
// sums, a step of the recursion backwards; and which comes next. See monce_cluster_block.h.
#pragma once

#include "monce_cluster_gradient.h"

namespace mghf::cuda {

namespace {

template <bool kBackward>
struct ClusterMap : ClusterBlock {
  using ClusterBlock::ClusterBlock;

  __device__ __forceinline__ ClusterMap again() const {
    return ClusterMap(p, shared, opaque(static_cast<int>(threadIdx.x)));
  }

  // ---- iterates ----

  __device__ __forceinline__ KeptIterates kept() const { return p.kept.of_map(state().map, n); }
  // u after an iteration, with v after it: in the state that a forward left, or in the workspace.
  __device__ __forceinline__ float* iterate(int iteration) const {
    return state().iterates + int64_t{iteration - 1} * state().pitch;
  }
  // A pointer in the state, to device memory.
  template <class T>
  __device__ __forceinline__ static T* global(T* pointer) {
    promise_global(pointer);
    return pointer;
  }
  // The iterations in a state that these kernels can go on from; 0 if there are none.
  __device__ __forceinline__ int resumable(int map) const {
    const KeptIterates of_map = p.kept.of_map(map, n);
    const int made = of_map.made();
    if (made < 1 || made > of_map.slots || made > kShortIterations) return 0;
    return of_map.vector(1, 2, n)[0] > 0 ? made : 0;
  }

  // Sets what an iteration, or a step of the recursion, reads and stores; by one thread.
  __device__ __forceinline__ void prepare() const {
    ClusterState& s = state();
    if (s.pass == Pass::iterate) {
      const bool stored = kBackward ? p.exact : s.t <= p.kept.slots;
      s.u = stored ? iterate(s.t) : nullptr;
      s.v = stored ? s.u + s.width : nullptr;
    } else if (kBackward && s.pass == Pass::recur) {
      const bool skipped = s.t > s.made;
      const int now = skipped ? s.made : s.t;
      const int before = skipped ? s.made : s.t - 1;
      const int term = (skipped ? s.made + 1 : s.t) - 1;
      s.begun = skipped && s.t < p.iterations;
      s.u = iterate(now);
      s.v = s.u + s.width;
      s.old_v = before > 0 ? iterate(before) + s.width : nullptr;
      s.columns = terms_of(*this).of_columns(term);
      s.rows = terms_of(*this).of_rows(term);
      if (s.t == p.iterations) s.last_term = term;
      s.first_term = term;
    }
  }
  __device__ __forceinline__ float old_v(int column) const {
    return state().old_v == nullptr ? 1 : global(state().old_v)[column];
  }

  // Begins a map, from the iterations in its state if there are any.
  __device__ __forceinline__ void begin(const Matrices& query, const Matrices& key, int map) {
    const int resumed = kBackward ? resumable(map) : 0;
    if (thread == 0) {
      ClusterState& s = state();
      s.pass = resumed > 0 ? Pass::weigh : Pass::iterate;
      s.t = resumed > 0 ? resumed : 1;
      s.made = resumed;
      s.resumed = resumed > 0;
      s.fits = true;
      s.settling = {};
      s.first_term = 0;
      s.last_term = -1;
      s.map = map;
      const bool repeats = kBackward && p.exact && resumed == 0;
      s.terms = repeats ? p.repeated + s.cluster * p.repeated_floats
                        : p.terms + s.cluster * p.terms_floats;
      s.iterates = repeats ? s.terms + p.repeated_floats - p.history_floats
                           : p.kept.of_map(map, n).vector(1, 0, n);
      s.width = n;
      s.pitch = repeats ? 2 * n : 4 * n;
      prepare();
    }
    __syncthreads();
    load(query, key);
    // state().made is what `resumed` was.
    const float* const u = global(iterate(state().made));
    const float* const v = state().resumed ? u + n : nullptr;
    if (thread < p.division.columns) {
      const int j = first + thread;
      weights()[thread] = j >= n ? 0.0f : v == nullptr ? 1.0f : v[j];
    }
    if constexpr (kBackward) {
      MGHF_UNROLL(1)
      for (int i = thread; v != nullptr && i < p.division.rows; i += threads()) {
        base(i) = i < n ? global(state().iterates)[2 * n + i] - kMark : 0;
        factor(i) = i < n ? u[i] : 0;
      }
    }
  }

  // ---- rows ----

  // x_i of the loss, from a row's sum of weights.
  __device__ __forceinline__ float excess(int i, float of_row, float sum) const {
    const unsigned owner = static_cast<unsigned>(i / kBlockColumns);
    const float own = -*of_block(&positive(i), owner) * state().unit;
    const float above = fmaf(own, p.contrast.low, fmaf(own, p.contrast.value, of_row - base(i)));
    return above * 0.6931471805599453f + (logf(factor(i) * sum) + p.log_weight);
  }

  // The coefficient in the columns' sums of row i, whose sum and exponent of w or of K are known.
  // All warps that have the row in a block come to the same; one writes it.
  __device__ __forceinline__ float coefficient(int i, float sum, float of_row,
                                               const Matrices& grad, float* losses) const {
    const ClusterState& s = state();
    const bool inside = i < n, writes = part == 0 && lane < 16;
    if (s.pass == Pass::iterate) {
      if (!inside) return 0;
      const float u = inverse_of(sum);
      if (!writes) return u;
      factor(i) = u;
      if (s.u != nullptr && rank == 0) {
        global(s.u)[i] = u;
        // The exponents follow the first v.
        if (!kBackward && s.t == 1) global(s.u)[2 * n + i] = of_row + kMark;
      }
      return u;
    }
    if (s.pass == Pass::weigh) {
      float r = 0, c = 0;
      if (inside) {
        const float x = excess(i, of_row, sum);
        if constexpr (kBackward) {
          r = grad.read(s.map, i, 0) * sigmoid_of(x);
          c = r * inverse_of(sum);
        } else if (writes && rank == 0) {
          losses[int64_t{s.map} * n + i] = softplus_of(x);
        }
      }
      if (kBackward && writes) share(i) = r, scaled(i) = c;
      return c;
    }
    float u = 0, c = 0;
    if (inside) {
      u = global(s.u)[i];
      c = u * ((s.t == p.iterations ? share(i) : 0) - u * sum);
    }
    if (writes && rank == 0) {
      float2& to = global(s.rows)[i];
      to = {u, c + (s.begun ? to.y : 0)};
    }
    return c;
  }

  __device__ __forceinline__ float& exponent_of_row(int i, bool weighing) const {
    return of_row(i)[weighing ? 1 : 0];
  }

  // The largest of each row's entries, times `value`.
  __device__ __forceinline__ static void find_largest(Products112& x, float value,
                                                      float (&most)[2]) {
    most[0] = most[1] = -INFINITY;
    for_entries(x, [&](float entry, int half, int, int) {
      most[half] = fmaxf(most[half], entry * value);
    });
  }
  // The entries' powers of two in their place, and each row's sum with the columns' weights.
  __device__ __forceinline__ void sum_rows(Products112& x, float value, float low, float of_row,
                                           float (&sum)[2]) const {
    sum[0] = sum[1] = 0;
    const float own[2] = {of_half(of_row, 0), of_half(of_row, 1)};
    MGHF_UNROLL_ALL
    for (int c = 0; c < kPartTiles; ++c) {
      const float2 w = reinterpret_cast<const float2&>(weights()[left() + 8 * c]);
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          float& entry = x[4 * c + 2 * half + i];
          entry = power_of(fmaf(entry, low, fmaf(entry, value, -own[half])));
          sum[half] += entry * (i == 0 ? w.x : w.y);
        }
      }
    }
    wait_for_copies<0>();
  }

  // Adds a tile of rows to the thread's sums of columns.
  __device__ __forceinline__ void take_tile(Products112& x, int tile, const Matrices& grad,
                                            float* losses,
                                            float (&columns)[2 * kPartTiles]) const {
    const bool weighing = state().pass == Pass::weigh;
    const float value = weighing ? state().weight : state().plan;
    const float low = weighing ? state().weight_low : state().plan_low;
    const bool unknown = weighing || (state().pass == Pass::iterate && state().t == 1);
    // Columns beyond the map have no weight, but must not count for the rows' exponents.
    again().hide(x, tile, value > 0 ? -1e30f : 1e30f, unknown);
    // The exponents of the rows in the scale of `value`, of row lane % 16 of the warp's, unless they
    // are known, then their sums: one exchange in a loop, as its code is long.
    float of_row = unknown ? 0 : base(warp_row(tile) + lane % 16), total = 0;
    MGHF_UNROLL(1)
    for (int step = unknown ? 0 : 1; step < 2; ++step) {
      float of_thread[2];
      if (step == 0) {
        find_largest(x, value, of_thread);
      } else {
        again().sum_rows(x, value, low, of_row, of_thread);
      }
      total = again().across_rows(of_thread, step == 0 ? 2 : tile % 2, step == 0);
      if (step == 0) {
        of_row = fabsf(total) < kLargestExponent ? round_to_integer(total) : total;
        if (part == 0 && lane < 16) {
          exponent_of_row(warp_row(tile) + lane, weighing) = of_row;
        }
      }
    }
    const float of_lane =
        again().coefficient(warp_row(tile) + lane % 16, total, of_row, grad, losses);
    const float of_first = of_half(of_lane, 0), of_second = of_half(of_lane, 1);
    MGHF_UNROLL_ALL
    for (int c = 0; c < kPartTiles; ++c) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        columns[2 * c + i] += of_first * x[4 * c + i];
        columns[2 * c + i] += of_second * x[4 * c + 2 + i];
      }
    }
  }

  // Goes through the rows; the sums of the block's columns, of each warp's rows, are in
  // of_columns() afterwards, or the gradient is written.
  __device__ __forceinline__ void go_through_rows(const Matrices& grad, const Matrices& key,
                                                  float* losses, void* result) const {
    float columns[2 * kPartTiles] = {};
    copy_queries(0);
    wait_for_copies<0>();
    __syncthreads();
    MGHF_UNROLL(1)
    for (int tile = 0; tile < p.division.tiles; ++tile) {
      if (tile + 1 < p.division.tiles) again().copy_queries(tile + 1);
      Products112 x;
      again().multiply(x, tile);
      if (kBackward && state().pass == Pass::differentiate) {
        write_gradient(again(), x, tile, key, result);
        // No sums are kept, so that they take no registers here.
        MGHF_UNROLL_ALL
        for (float& sum : columns) sum = 0;
      } else {
        again().take_tile(x, tile, grad, losses, columns);
      }
    }
    if (!kBackward || state().pass != Pass::differentiate) again().join_lanes(columns);
  }
  // Adds up the sums of a warp's rows, which are with the lanes of the same t. Each time lanes add
  // up half of their sums and leave the others to their partners.
  __device__ __forceinline__ void join_lanes(float (&x)[2 * kPartTiles]) const {
    static_assert(kPartTiles == 14);
    const bool odd = join_pairs<14, 28>(x, 4), second = join_pairs<7, 14>(x, 8);
    const bool upper = join_pairs<4, 7>(x, 16);
    const int begin = (odd ? 14 : 0) + (second ? 7 : 0) + (upper ? 4 : 0);
    float* const to = of_columns() + warp * p.division.columns + left();
    MGHF_UNROLL_ALL
    for (int k = 0; k < 4; ++k) {
      const int column = begin + k;
      if (k < 3 || !upper) to[8 * (column / 2) + column % 2] = x[k];
    }
  }
  // Adds up the first kLeft of kCount sums with a lane, or, if the result says so, those after them.
  // A sum without a counterpart is added up for both lanes.
  template <int kLeft, int kCount>
  __device__ __forceinline__ bool join_pairs(float (&x)[2 * kPartTiles], int lanes) const {
    const bool later = (lane & lanes) != 0;
    MGHF_UNROLL_ALL
    for (int k = 0; k < kLeft; ++k) {
      const float other = k + kLeft < kCount ? x[k + kLeft] : x[k];
      const float sent = later ? x[k] : other;
      x[k] = (later ? other : x[k]) + __shfl_xor_sync(~0u, sent, lanes);
    }
    return later;
  }

  // ---- columns ----

  // Weights of the columns for a step of the recursion.
  __device__ __forceinline__ void weigh_columns() const {
    if (thread >= p.division.columns) return;
    const int j = first + thread;
    const float w = j < n ? global(state().v)[j] * dg()[thread] : 0;
    float2& to = global(state().columns)[j];
    to = {w + (state().begun ? to.x : 0), j < n ? old_v(j) : 0};
    weights()[thread] = w;
  }

  // The columns' weights of the losses, after those of a recursion.
  __device__ __forceinline__ void load_last_v() const {
    if (!p.exact || thread >= p.division.columns) return;
    const int j = first + thread;
    weights()[thread] = j < n ? global(iterate(state().made))[n + j] : 0;
  }

  // Takes the columns' sums. Returns the ranges of u and 1 / v and of the changes of v, or that of
  // dg.
  __device__ __forceinline__ Ranges take_columns() const {
    Ranges ranges;
    const Pass pass = state().pass;
    if (pass == Pass::iterate) {
      MGHF_UNROLL(1)
      for (int i = thread; i < n; i += threads()) ranges.numbers.take(factor(i));
    }
    const int j = first + thread;
    const int columns = p.division.columns;
    if (thread >= columns || j >= n) return ranges;
    const float* const from = of_columns() + thread;
    const float total = (from[0] + from[columns]) + (from[2 * columns] + from[3 * columns]);
    if (pass == Pass::iterate) {
      ranges.numbers.take(total);
      ranges.changes.take(weights()[thread] * total);
      const float v = inverse_of(total);
      weights()[thread] = v;
      if (state().v != nullptr) global(state().v)[j] = v;
    } else if (pass == Pass::weigh) {
      dg()[thread] = weights()[thread] * total;
    } else {
      const float d = -old_v(j) * total;
      dg()[thread] = d;
      ranges.numbers.take(d);
    }
    return ranges;
  }

  // The ranges of all blocks' numbers. A barrier of the cluster.
  __device__ __forceinline__ Ranges of_cluster(Ranges ranges) const {
    ranges = ranges_of_block(ranges, of_warps());
    float4* const own = reinterpret_cast<float4*>(shared + ClusterDivision::kRanges);
    if (thread == 0) {
      *own = {ranges.numbers.least, ranges.numbers.most, ranges.changes.least,
              ranges.changes.most};
    }
    sync_cluster();
    if (thread != 0) return ranges;
    MGHF_UNROLL(1)
    for (int r = 0; r < p.division.blocks; ++r) {
      const float4 of_rank = *of_block(own, static_cast<unsigned>(r));
      ranges.numbers.take(of_rank.x), ranges.numbers.take(of_rank.y);
      ranges.changes.take(of_rank.z), ranges.changes.take(of_rank.w);
    }
    return ranges;
  }

  // How much of the gradient the recursion may leave out.
  __device__ __forceinline__ float negligible() const {
    // Each block counts some of the rows, all of which it has.
    float total = 0;
    MGHF_UNROLL(1)
    for (int i = rank * threads() + thread; i < n; i += p.division.blocks * threads()) {
      total += fabsf(share(i));
    }
    total = across_cluster(total, p.division.blocks, shared, 0, Add{});
    return p.negligible_part * total;
  }

  // Decides what comes next; by one thread.
  __device__ __forceinline__ void go_on(const Ranges& ranges, float may_leave) const {
    const Range &numbers = ranges.numbers, &changes = ranges.changes;
    ClusterState& s = state();
    if (s.pass == Pass::iterate) {
      s.failed = !(numbers.least >= kLeastSum && numbers.most <= kMostSum);
      s.fits = s.fits && numbers.least >= kSmallestSum && numbers.most <= kLargestSum;
      s.made = s.t;
      if (s.settling.settled(s.t, changes.most - changes.least) || s.t == p.iterations) {
        s.pass = Pass::weigh;
      } else {
        ++s.t;
      }
    } else if (s.pass == Pass::weigh) {
      s.pass = p.exact ? Pass::recur : Pass::differentiate;
      s.negligible = may_leave;
      s.t = p.iterations;
    } else {
      const float rest = static_cast<float>(s.t) * static_cast<float>(n);
      if (rest * (numbers.most - numbers.least) <= s.negligible || s.t == 1) {
        s.pass = Pass::differentiate;
      } else {
        --s.t;
      }
    }
    prepare();
  }

  // Runs the passes. A barrier of the cluster at the end.
  __device__ __forceinline__ void run(const Matrices& grad, const Matrices& key, float* losses,
                                      void* result) const {
    constexpr Pass kLast = kBackward ? Pass::differentiate : Pass::weigh;
    MGHF_UNROLL(1)
    while (!state().failed) {
      if (kBackward && state().pass == Pass::recur) weigh_columns();
      if (kBackward && state().pass == Pass::differentiate) load_last_v();
      again().go_through_rows(grad, key, losses, result);
      if (state().pass == kLast) break;
      __syncthreads();
      Ranges ranges = again().take_columns();
      float may_leave = 0;
      if (kBackward && state().pass == Pass::weigh) {
        may_leave = p.exact ? again().negligible() : 0;
      } else {
        ranges = again().of_cluster(ranges);
      }
      __syncthreads();
      if (thread == 0) go_on(ranges, may_leave);
      __syncthreads();
    }
    sync_cluster();
  }

  // ---- results ----

  // The losses were written by the last pass. Completes the state: the number of iterates, and
  // zeros in the unused rows.
  __device__ __forceinline__ void finish(float* losses) const {
    if (rank != 0) return;
    if (state().failed) {
      for (int i = thread; i < n; i += threads()) losses[int64_t{state().map} * n + i] = NAN;
    }
    const KeptIterates to = kept();
    const int left = state().fits && !state().failed ? state().made : 0;
    MGHF_UNROLL(1)
    for (int i = thread; i < n; i += threads()) {
      to.rows[i] = i == 0 && left <= to.slots ? left : 0;
      MGHF_UNROLL(1)
      for (int slot = 1; slot <= to.slots; ++slot) {
        MGHF_UNROLL(1)
        for (int which = slot > left ? 0 : slot == 1 ? 3 : 2; which < 4; ++which) {
          to.vector(slot, which, n)[i] = 0;
        }
      }
    }
  }

  // The gradient was written by the last pass.
  __device__ __forceinline__ void finish_gradient(const Matrices& query, void* result) const {
    if (!state().failed || rank != 0) return;
    const int numbers = n * static_cast<int>(query.columns);
    MGHF_UNROLL(1)
    for (int i = thread; i < numbers; i += threads()) {
      write_element(query.element, result, int64_t{state().map} * numbers + i, NAN);
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
