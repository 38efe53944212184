// The passes of a warp through its map of `monce`: the iterations, the losses, and the gradient
// with the recursion backwards. See monce_warp_block.h.
#pragma once

#include "monce_warp_block.h"

namespace mghf::cuda {

namespace {

// u and v of the iterations in memory: those of iteration t are `pitch` (t - 1) numbers further,
// and v follows `width` numbers after u.
struct Iterates {
  float* numbers;
  int width, pitch;

  __device__ __forceinline__ float* u(int t) const {
    return numbers + int64_t{t - 1} * pitch;
  }
  __device__ __forceinline__ float* v(int t) const { return u(t) + width; }
};

// The state of a map, and what the iterations leave of it in each lane.
template <int kTiles>
struct WarpSolver : WarpMap<kTiles> {
  using Map = WarpMap<kTiles>;
  using typename Map::Entries, typename Map::OfRows, typename Map::OfColumns;
  using Map::p, Map::n, Map::map, Map::lane, Map::kRows, Map::kColumns;

  float base = 0, u = 1, v = 1;  // a_i and u of the lane's own row, v of its own column
  int made = 0;
  bool failed = false, fits = true;  // whether sums left float32's range, the state's range

  __device__ __forceinline__ WarpSolver(const WarpProblem& p, float* shared, int map, int lane)
      : Map(p, shared, map, lane) {}

  // The map's state, and where it has its iterates.
  __device__ __forceinline__ KeptIterates kept() const { return p.kept.of_map(map, n); }
  __device__ __forceinline__ Iterates of_state() const {
    return {kept().vector(1, 0, n), n, 4 * n};
  }

  // The iterations, each of which is stored if it is at most `stored`.
  __device__ __forceinline__ void iterate(const Entries& kernel, const Iterates& to, int stored) {
    OfColumns of_column;
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumns; ++c) of_column[c] = 1;
    Settling settling;
    MGHF_UNROLL(1)
    for (int t = 1; t <= p.iterations; ++t) {
      const float of_row = this->weighted_row(kernel, of_column);
      u = this->has_row() ? 1 / of_row : 0;
      OfRows weight;
      this->of_rows(weight, u);
      const float total = this->weighted_column(kernel, weight);
      const float change = v * total;
      v = this->has_column() ? 1 / total : 0;
      this->of_columns(of_column, v);
      made = t;
      if (t <= stored) {
        if (this->writes_row()) to.u(t)[this->row()] = u;
        if (this->writes_column()) to.v(t)[this->column()] = v;
      }
      const auto within = [&](float least, float most) {
        const bool rows = !this->has_row() || (u >= least && u <= most);
        return rows && (!this->has_column() || (total >= least && total <= most));
      };
      fits = fits && within(kSmallestSum, kLargestSum);
      const bool sound = within(kLeastSum, kMostSum);
      const float spread =
          spread_of_lanes(sound ? change : NAN, this->has_column() || !sound);
      failed = !(spread >= 0);
      if (failed || settling.settled(t, spread)) break;
    }
  }

  // x_i of the loss of the lane's own row, from its sum of weights.
  __device__ __forceinline__ float excess(float top, float positive, float sum) const {
    const float above =
        fmaf(-positive, p.contrast.low, fmaf(-positive, p.contrast.value, top - base));
    return above * 0.6931471805599453f + (logf(u * sum) + p.log_weight);
  }

  // Whether the hidden entries are hidden from the weights' factor too.
  __device__ __forceinline__ bool of_one_sign() const {
    return (p.plan.value > 0) == (p.weight.value > 0);
  }
};

// ---- forward ----

// Writes a map's losses and the state.
template <int kTiles>
__device__ __forceinline__ void write_losses(const WarpProblem& p, float* shared, int map,
                                             int lane, const Matrices& query, const Matrices& key,
                                             float* losses) {
  using Solver = WarpSolver<kTiles>;
  Solver s(p, shared, map, lane);
  const int numbers = static_cast<int>(p.kept.numbers(p.n));
  MGHF_UNROLL(4)
  for (int i = lane; i < numbers; i += kWarp) s.kept().rows[i] = 0;
  typename Solver::Entries x, power;
  s.load(query, key);
  s.multiply(x, static_cast<int>(query.columns));
  const float positive = s.hide(x, p.plan.value);
  s.base = s.top_of_row(x, p.plan);
  s.take_powers(power, x, p.plan, s.base);
  const int slots = p.kept.slots;
  __syncwarp();  // the zeros are written
  if (slots > 0 && s.writes_row()) s.kept().vector(1, 2, p.n)[s.row()] = s.base + kMark;
  s.iterate(power, s.of_state(), slots);
  const bool fits = __reduce_min_sync(kAllLanes, s.fits ? 1u : 0u) != 0;
  if (lane == 0 && fits && !s.failed && s.made <= slots) s.kept().rows[0] = s.made;

  if (!s.of_one_sign()) s.hide_from_other_sign(x);
  const float top = s.top_of_row(x, p.weight);
  s.take_powers(power, x, p.weight, top);
  typename Solver::OfColumns v;
  s.of_columns(v, s.v);
  const float loss = softplus_of(s.excess(top, positive, s.weighted_row(power, v)));
  if (s.writes_row()) losses[int64_t{map} * p.n + s.row()] = s.failed ? NAN : loss;
}

// ---- backward ----

// The number of iterations in a map's state that these kernels can go on from; 0 if there are none.
__device__ __forceinline__ int resumable(const WarpProblem& p, int map) {
  const KeptIterates kept = p.kept.of_map(map, p.n);
  const int made = kept.made();
  if (made < 1 || made > kept.slots) return 0;
  return kept.vector(1, 2, p.n)[0] > 0 ? made : 0;
}

template <int kTiles>
struct WarpGradient : WarpSolver<kTiles> {
  using Solver = WarpSolver<kTiles>;
  using typename Solver::Entries, typename Solver::OfRows, typename Solver::OfColumns;
  using Solver::p, Solver::n, Solver::map, Solver::g, Solver::t, Solver::kRows, Solver::kColumns,
      Solver::kept, Solver::base, Solver::u, Solver::v, Solver::made;

  Iterates iterates{};

  __device__ __forceinline__ WarpGradient(const WarpProblem& p, float* shared, int map, int lane)
      : Solver(p, shared, map, lane) {}

  __device__ __forceinline__ float u_after(int t) const {
    return this->has_row() ? iterates.u(t)[this->row()] : 0;
  }
  __device__ __forceinline__ float v_after(int t) const {
    return !this->has_column() ? 0 : t > 0 ? iterates.v(t)[this->column()] : 1;
  }

  // Goes on from the iterations in the state, or makes them again.
  __device__ __forceinline__ void solve(Entries& kernel, const Entries& x, int resumed, int warp) {
    if (resumed > 0) {
      iterates = this->of_state();
      base = (this->has_row() ? kept().vector(1, 2, n)[this->row()] : kMark) - kMark;
      u = u_after(resumed);
      v = v_after(resumed);
      made = resumed;
    } else {
      base = this->top_of_row(x, p.plan);
    }
    this->take_powers(kernel, x, p.plan, base);
    if (uniform(resumed) > 0) return;
    iterates = {p.repeated + int64_t{warp} * p.iterations * 2 * n, n, 2 * n};
    this->iterate(kernel, iterates, p.exact ? p.iterations : 0);
    __syncwarp();  // lanes with the same row or column read what one of them stored
  }

  // How much of the gradient the recursion may leave out.
  __device__ __forceinline__ float negligible(float share) const {
    float total = across_lanes(this->writes_row() ? fabsf(share) : 0, Add{});
    total = bits_as<float>(uniform(bits_as<int>(total)));
    // The sum of |ds| is at least that of |r| / t, from the diagonal alone.
    const float part = p.inverse_temperature * (1 / fabsf(p.slope));
    return kNegligiblePart * total * (part < 1 ? part : 1);
  }

  // Adds the gradient through the plan to ds. `dg`: the sums of the weights' columns; `share`: r_i.
  __device__ __forceinline__ void recur(Entries& ds, const Entries& kernel, float dg,
                                        float share) const {
    const float negligible = this->negligible(share);
    float new_u = u, new_v = v;
    MGHF_UNROLL(1)
    for (int t = p.iterations; t >= 1; --t) {
      // Iterations that were not made would have had the last one's results.
      const float old_u = t > 1 && t <= made ? u_after(t - 1) : new_u;
      const float old_v = t <= made ? v_after(t - 1) : new_v;
      const float by_column = new_v * dg;
      OfColumns column_weight, column;
      this->of_columns(column_weight, by_column);
      const float sum = this->weighted_row(kernel, column_weight);
      const float by_row = new_u * ((t == p.iterations ? share : 0) - new_u * sum);
      OfRows row_weight, row;
      this->of_rows(row_weight, by_row);
      dg = -old_v * this->weighted_column(kernel, row_weight);
      this->of_rows(row, -p.slope * new_u);
      this->of_columns(column, old_v);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) {
        const float scaled = -p.slope * row_weight[k];
        MGHF_UNROLL_ALL
        for (int c = 0; c < kColumns; ++c) {
          const float through = fmaf(row[k], column_weight[c], scaled * column[c]);
          ds[k][c] = fmaf(kernel[k][c], through, ds[k][c]);
        }
      }
      const float rest = static_cast<float>(t) * static_cast<float>(n);
      const float spread = spread_of_lanes(dg, this->has_column());
      if (uniform(rest * spread <= negligible)) break;
      new_u = old_u;
      new_v = old_v;
    }
  }

  // Makes ds of the similarities x.
  __device__ __forceinline__ void differentiate(Entries& x, const Entries& kernel, float positive,
                                                const Matrices& grad) const {
    if (!this->of_one_sign()) this->hide_from_other_sign(x);
    const float top = this->top_of_row(x, p.weight);
    this->take_powers(x, x, p.weight, top);
    OfColumns of_column;
    this->of_columns(of_column, v);
    const float sum = this->weighted_row(x, of_column);
    const float upstream = this->has_row() ? grad.read(map, this->row(), 0) : 0;
    const float sigmoid = sigmoid_of(this->excess(top, positive, sum));
    const float share = this->has_row() ? upstream * sigmoid : 0;
    OfRows scaled;
    this->of_rows(scaled, this->has_row() ? share * (1 / sum) : 0);
    OfColumns total;
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumns; ++c) {
      total[c] = 0;
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) {
        const float weight = x[k][c] * of_column[c] * scaled[k];
        total[c] += weight;
        x[k][c] = weight * (p.inverse_temperature + p.slope);
      }
    }
    if (p.exact) recur(x, kernel, this->sum_of_column(total), share);
    OfRows diagonal;
    this->of_rows(diagonal, -share * p.inverse_temperature);
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        if (g == 2 * t + i) x[k][2 * k + i] = diagonal[k];
      }
    }
  }

  // Writes the gradient of a map's queries.
  __device__ __forceinline__ void write(int resumed, int warp, const Matrices& grad,
                                        const Matrices& query, const Matrices& key, void* result) {
    Entries x, kernel;
    this->load(query, key);
    this->multiply(x, static_cast<int>(query.columns));
    const float positive = this->hide(x, p.plan.value);
    solve(kernel, x, resumed, warp);
    differentiate(x, kernel, positive, grad);
    if (this->failed) {
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) {
        MGHF_UNROLL_ALL
        for (int c = 0; c < kColumns; ++c) x[k][c] = NAN;
      }
    }
    this->again().multiply_by_keys(x, static_cast<int>(query.columns), result);
    if (!p.fours_of_result) this->again().write_staged(result, query);
  }
};

}  // namespace

}  // namespace mghf::cuda
