// The passes of `monce` on chip through a map: an iteration, the losses with the weights' sums, a
// step of the recursion backwards; and which comes next. See monce_chip_block.h.
#pragma once

#include "monce_chip_gradient.h"

namespace mghf::cuda {

namespace {

constexpr int kShortIterations = 6;  // whose terms every map has memory for

template <bool kExp, bool kBackward>
struct ChipMap : ChipBlock<kExp> {
  using Block = ChipBlock<kExp>;
  using Mask = typename Block::Mask;
  using Block::n, Block::p, Block::state, Block::thread, Block::threads, Block::columns,
      Block::rows, Block::left, Block::lane, Block::g, Block::t, Block::weights, Block::dg,
      Block::parts, Block::base, Block::factor, Block::top, Block::share, Block::scaled,
      Block::positive;

  __device__ __forceinline__ ChipMap(const ChipProblem& p, float* shared, int thread)
      : Block(p, shared, thread) {}

  // ---- iterates ----

  __device__ __forceinline__ KeptIterates kept(int map) const {
    return {p.kept.rows + map * p.state_numbers, p.kept.slots};
  }
  // The number of iterations in a map's state that these kernels can go on from; 0 if there are
  // none.
  __device__ __forceinline__ int resumable(int map) const {
    const KeptIterates own = kept(map);
    const int made = own.made();
    if (made < 1 || made > own.slots || made > kShortIterations) return 0;
    return own.vector(1, 2, p.n)[0] > 0 ? made : 0;
  }
  // u after an iteration, and v after it: in the state that a forward left, or in the workspace.
  __device__ __forceinline__ float* iterate(int iteration) const {
    return state.iterates + int64_t{iteration - 1} * state.pitch;
  }
  // A pointer in the state, to device memory.
  template <class T>
  __device__ __forceinline__ static T* global(T* pointer) {
    promise_global(pointer);
    return pointer;
  }

  // Sets what an iteration, or a step of the recursion, reads and stores; by one thread.
  __device__ __forceinline__ void prepare() const {
    if (state.pass == Pass::iterate) {
      const bool stored = kBackward ? state.exact : state.t <= p.kept.slots;
      state.u = stored ? iterate(state.t) : nullptr;
    } else if (kBackward && state.pass == Pass::recur) {
      const bool skipped = state.t > state.made;
      const int now = skipped ? state.made : state.t;
      const int before = skipped ? state.made : state.t - 1;
      const int term = (skipped ? state.made + 1 : state.t) - 1;
      const ChipTerms terms{state.terms, columns, rows};
      state.begun = skipped && state.t < p.iterations;
      state.u = iterate(now);
      state.old_v = before > 0 ? iterate(before) + state.width : nullptr;
      state.columns = &terms.column(term, 0);
      state.rows = &terms.row(term, 0);
      if (state.t == p.iterations) state.last_term = term;
      state.first_term = term;
    }
  }
  __device__ __forceinline__ float old_v(int j) const {
    return state.old_v == nullptr ? 1 : global(state.old_v)[j];
  }

  // The block's part of the workspace.
  __device__ __forceinline__ void set_memory(int block) const {
    if (block < p.blocks) {
      state.terms = p.terms + block * ChipTerms::floats(p.division, p.short_terms);
      return;
    }
    state.terms = p.repeated +
                  (block - p.blocks) * ChipTerms::repeated_floats(p.division, n, p.iterations);
    state.iterates = state.terms + ChipTerms::floats(p.division, p.iterations + 1);
    state.pitch = 2 * n;
  }

  // Begins a map, from the iterations in its state if there are any.
  __device__ __forceinline__ void begin(const Matrices& query, const Matrices& key, int map,
                                        int resumed, int block) {
    if (thread_again() == 0) {
      state.pass = resumed > 0 ? Pass::weigh : Pass::iterate;
      state.t = resumed > 0 ? resumed : 1;
      state.made = resumed;
      state.resumed = resumed > 0;
      state.fits = true;
      state.settling = {};
      state.first_term = 0;
      state.last_term = -1;
      state.map = map;
      state.iterates = kept(map).vector(1, 0, n);
      state.width = n;
      state.pitch = 4 * n;
      state.exact = p.again > 0;
      if (kBackward && p.again > 0) set_memory(block);
    }
    again().load(query, key, map);
    again().begin_iterates();
  }

  // What the first pass needs of the columns and, with iterations in the state, of the rows.
  __device__ __forceinline__ void begin_iterates() const {
    const bool resumed = kBackward && state.resumed;
    const float* const u = global(iterate(state.made));
    const float* const v = u + state.width;
    MGHF_UNROLL(1)
    for (int j = thread; j < columns; j += threads) {
      weights[j] = j >= n ? 0.0f : resumed ? v[j] : 1.0f;
    }
    if (!resumed) return;
    const float* const exponents = global(state.iterates) + 2 * state.width;
    MGHF_UNROLL(1)
    for (int i = thread; i < rows; i += threads) {
      base[i] = i < n ? exponents[i] - kMark : 0;
      factor[i] = i < n ? u[i] : 0;
    }
  }

  // ---- rows ----

  // Writes `nothing` over the entries that do not count; those of the diagonal go to `positive`.
  __device__ __forceinline__ void hide(Tile& x, int tile, float nothing) const {
    const Mask mask(*this, tile);
    if (!mask.any) return;
    this->for_tiles(x, [&](int c) {
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRowsOfThread; ++k) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          float& entry = x[k / 2][0][k % 2 * 2 + i];
          const bool own = mask.diagonal(k / 2, c, k % 2 * 2 + i);
          if (own) positive[this->row_of(tile, k)] = entry;
          entry = own || mask.outside(c, i) ? nothing : entry;
        }
      }
    });
  }

  // x_i of the loss, from a row's sum of weights.
  __device__ __forceinline__ float excess(int i, float of_row, float sum) const {
    const float own = -positive[i];
    const float above =
        fmaf(own, state.contrast_low, fmaf(own, state.contrast, of_row - base[i]));
    return above * 0.6931471805599453f + (logf(factor[i] * sum) + p.log_weight);
  }

  // A row's coefficient in the columns' sums, once its sum is known. One thread calls it.
  __device__ __forceinline__ float coefficient(int i, float sum, const Matrices& grad,
                                               float* losses) const {
    const bool inside = i < n;
    if (state.pass == Pass::iterate) {
      if (!inside) return 0;
      const float u = 1 / sum;
      factor[i] = u;
      if (state.u != nullptr) {
        global(state.u)[i] = u;
        // The exponents follow the first v.
        if (!kBackward && state.t == 1) global(state.u)[2 * n + i] = base[i] + kMark;
      }
      return u;
    }
    if (state.pass == Pass::weigh) {
      float r = 0, c = 0;
      if (inside) {
        const float x = excess(i, top[i], sum);
        if constexpr (kBackward) {
          r = grad.read(state.map, i, 0) * sigmoid_of(x);
          c = r * (1 / sum);
        } else {
          losses[int64_t{state.map} * n + i] = softplus_of(x);
        }
      }
      if (kBackward) share[i] = r, scaled[i] = c;
      return c;
    }
    float u = 0, c = 0;
    if (inside) {
      u = global(state.u)[i];
      c = u * ((state.t == p.iterations ? share[i] : 0) - u * sum);
    }
    float2& to = global(state.rows)[i];
    to = {u, c + (state.begun ? to.y : 0)};
    return c;
  }

  __device__ __forceinline__ ChipMap again() const {
    return ChipMap(p, this->shared(), thread_again());
  }

  // The thread's sums of columns, in shared memory.
  __device__ __forceinline__ float& column_sum(int c, int i) const {
    return this->sums[(2 * c + i) * threads + thread];
  }

  // The largest product of the warp's entries in the pass.
  __device__ __forceinline__ float& highest() const {
    return this->of_warps[8 * this->warp + 4];
  }

  // Adds a tile of rows, whose products x has, to the thread's sums of columns.
  __device__ __forceinline__ void take_tile(Tile& x, int tile, const Matrices& grad,
                                            float* losses) const {
    const bool weighing = state.pass == Pass::weigh;
    const float value = weighing ? state.weight : state.plan;
    const float low = weighing ? state.weight_low : state.plan_low;
    const float linear = weighing ? state.linear : 0;
    float* const exponents = (weighing ? top : base) + tile * this->tile_rows;
    hide(x, tile, this->nothing(value));
    if (weighing || (state.pass == Pass::iterate && state.t == 1)) {
      float most[kRowsOfThread], high = -INFINITY;
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRowsOfThread; ++k) most[k] = -INFINITY;
      this->each_tile(x, [&](int, int at) {
        MGHF_UNROLL_ALL
        for (int k = 0; k < kRowsOfThread; ++k) {
          MGHF_UNROLL_ALL
          for (int i = 0; i < 2; ++i) {
            const float entry = x[k / 2][at][k % 2 * 2 + i];
            most[k] = fmaxf(most[k], this->rough_exponent(entry, value, linear));
            // Hidden entries are larger than any score.
            if (kExp && kBackward && entry * state.unit < 50) high = fmaxf(high, entry);
          }
        }
      });
      if constexpr (kExp && kBackward) {
        high = across_lanes(high, Most{});
        if (lane == 0) highest() = tile == 0 ? high : most_of(highest(), high);
      }
      this->across_row(most, Most{}, [&](int r, float y) {
        exponents[r] = fabsf(y) < kLargestExponent ? round_to_integer(y) : y;
      });
    }
    float sum[kRowsOfThread] = {};
    const float* const of_row = exponents + this->band * kWarpRows + g;
    this->each_tile(x, [&](int c, int at) {
      const float2 w = reinterpret_cast<const float2&>(weights[left + 8 * c + 2 * t]);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRowsOfThread; ++k) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          float& entry = x[k / 2][at][k % 2 * 2 + i];
          entry = power_of(this->exponent(entry, value, low, linear, of_row[8 * k]));
          sum[k] += entry * (i == 0 ? w.x : w.y);
        }
      }
    });
    wait_for_copies<0>();
    this->across_row(sum, Add{}, [&](int r, float total) {
      this->coefficients[r] =
          coefficient(tile * this->tile_rows + r, total, grad, losses);
    });
    float c[kRowsOfThread];
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRowsOfThread; ++k) {
      c[k] = this->coefficients[this->band * kWarpRows + k * 8 + g];
    }
    MGHF_UNROLL_ALL
    for (int of = 0; of < kColumnTiles; ++of) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        float total = tile == 0 ? 0 : column_sum(of, i);
        MGHF_UNROLL_ALL
        for (int k = 0; k < kRowsOfThread; ++k) total += c[k] * x[k / 2][of][k % 2 * 2 + i];
        column_sum(of, i) = total;
      }
    }
  }

  // Goes through the rows. The columns' sums are in `parts` afterwards; of the last pass there are
  // none.
  __device__ __forceinline__ void go_through_rows(const Matrices& grad, const Matrices& key,
                                                  float* losses, void* result) const {
    again().copy_queries(0);
    wait_for_copies<0>();
    __syncthreads();
    MGHF_UNROLL(1)
    for (int tile = 0; tile < p.division.tiles; ++tile) {
      if (tile + 1 < p.division.tiles) again().copy_queries(tile + 1);
      Tile x;
      again().multiply(x, tile);
      if (kBackward && state.pass == Pass::differentiate) {
        write_gradient<kExp>(*this, x, tile, key, result);
      } else {
        again().take_tile(x, tile, grad, losses);
      }
    }
    if (state.pass != Pass::differentiate) again().join_lanes();
  }

  // The warp's sums of columns, from those of its threads.
  __device__ __forceinline__ void join_lanes() const {
    __syncwarp();
    // Column 8 c + 2 t + i is number 2 c + i of the eight threads with that t. Lanes take them in
    // different orders, so that banks differ.
    MGHF_UNROLL(1)
    for (int which = g; which < 2 * kColumnTiles; which += 8) {
      const float* const from = this->sums + which * threads + thread - lane + t;
      float total = 0;
      MGHF_UNROLL_ALL
      for (int k = 0; k < 8; ++k) total += from[(k + g) % 8 * 4];
      parts[this->band * columns + left + which / 2 * 8 + 2 * t + which % 2] = total;
    }
  }

  // ---- columns ----

  // Weights of the columns for a step of the recursion.
  __device__ __forceinline__ void weigh_columns() const {
    MGHF_UNROLL(1)
    for (int j = thread; j < columns; j += threads) {
      const float w = j < n ? global(state.u)[n + j] * dg[j] : 0;
      float2& to = global(state.columns)[j];
      to = {w + (state.begun ? to.x : 0), j < n ? old_v(j) : 0};
      weights[j] = w;
    }
  }

  // Takes the columns' sums. Returns the ranges of u and 1 / v and of the changes of v, or that of
  // dg.
  __device__ __forceinline__ Ranges take_columns() const {
    Ranges ranges;
    MGHF_UNROLL(1)
    for (int j = thread; j < n; j += threads) {
      const float total = parts[j] + (p.division.bands > 1 ? parts[columns + j] : 0);
      if (state.pass == Pass::iterate) {
        ranges.numbers.take(total);
        ranges.numbers.take(factor[j]);
        ranges.changes.take(weights[j] * total);
        weights[j] = 1 / total;
        if (state.u != nullptr) global(state.u)[n + j] = weights[j];
      } else if (state.pass == Pass::weigh) {
        dg[j] = weights[j] * total;
      } else {
        dg[j] = -old_v(j) * total;
        ranges.numbers.take(dg[j]);
      }
    }
    return ranges;
  }

  // How much of the gradient the recursion may leave out.
  __device__ __forceinline__ float negligible() const {
    float total = 0;
    MGHF_UNROLL(1)
    for (int i = thread; i < n; i += threads) total += fabsf(share[i]);
    total = this->across_warps(across_lanes(total, Add{}), Add{});
    // The sum of |ds| is at least that of |r| / t, from the diagonal alone.
    float steepest = fabsf(p.slope);
    if constexpr (kExp) {
      steepest *= short_exponential(this->across_warps(highest(), Most{}) * state.unit);
    }
    const float part = p.inverse_temperature * (1 / steepest);
    return kNegligiblePart * total * (part < 1 ? part : 1);
  }

  // Decides what comes next; by one thread.
  __device__ __forceinline__ void go_on(const Ranges& ranges, float may_leave) const {
    const Range &numbers = ranges.numbers, &changes = ranges.changes;
    if (state.pass == Pass::iterate) {
      state.failed = !(numbers.least >= kLeastSum && numbers.most <= kMostSum);
      state.fits = state.fits && numbers.least >= kSmallestSum && numbers.most <= kLargestSum;
      state.made = state.t;
      if (state.settling.settled(state.t, changes.most - changes.least) ||
          state.t == p.iterations) {
        state.pass = Pass::weigh;
      } else {
        ++state.t;
      }
    } else if (state.pass == Pass::weigh) {
      state.pass = state.exact ? Pass::recur : Pass::differentiate;
      state.negligible = may_leave;
      state.t = p.iterations;
    } else {
      const float rest = static_cast<float>(state.t) * static_cast<float>(n);
      if (rest * (numbers.most - numbers.least) <= state.negligible || state.t == 1) {
        state.pass = Pass::differentiate;
      } else {
        --state.t;
      }
    }
  }

  // What the columns need before a pass.
  __device__ __forceinline__ void begin_pass() const {
    if (state.pass == Pass::recur) weigh_columns();
    if (state.pass != Pass::differentiate || !state.exact) return;
    MGHF_UNROLL(1)
    for (int j = thread; j < n; j += threads) weights[j] = global(iterate(state.made))[n + j];
  }

  // Runs the passes, up to the losses or the gradient, unless the similarities cannot be handled.
  __device__ __forceinline__ void run(const Matrices& grad, const Matrices& key, float* losses,
                                      void* result) const {
    constexpr Pass kLast = kBackward ? Pass::differentiate : Pass::weigh;
    MGHF_UNROLL(1)
    while (!state.failed) {
      if (thread_again() == 0) prepare();
      __syncthreads();
      if constexpr (kBackward) again().begin_pass();
      go_through_rows(grad, key, losses, result);
      if (state.pass == kLast) return;
      __syncthreads();
      Ranges ranges = again().take_columns();
      float may_leave = 0;
      if (kBackward && state.pass == Pass::weigh) {
        if (state.exact) may_leave = again().negligible();
      } else {
        ranges = ranges_of_block(ranges, this->of_warps);
      }
      __syncthreads();
      if (thread_again() == 0) go_on(ranges, may_leave);
      __syncthreads();  // prepare() is thread 0's too, but all look at what failed
    }
  }

  // ---- results ----

  // The losses were written by the last pass. Completes the state: the number of iterates, and
  // zeros in the unused rows.
  __device__ __forceinline__ void finish(float* losses) const {
    if (state.failed) {
      MGHF_UNROLL(1)
      for (int i = thread; i < n; i += threads) losses[int64_t{state.map} * n + i] = NAN;
    }
    const KeptIterates to = kept(state.map);
    const int left = state.fits && !state.failed ? state.made : 0;
    MGHF_UNROLL(1)
    for (int i = thread; i < n; i += threads) {
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
    if (!state.failed) return;
    const int numbers = n * static_cast<int>(query.columns);
    MGHF_UNROLL(1)
    for (int i = thread; i < numbers; i += threads) {
      write_element(query.element, result, int64_t{state.map} * numbers + i, NAN);
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
