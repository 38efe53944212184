// One matrix's Sinkhorn iterations and the gradient through them, for the ops `sinkhorn` and
// `monce`. See mghf_fast/reference/sinkhorn.py for the mathematics.
//
// Method. K_ij = 2^(y_ij - a_i - b_j) with y = score / epsilon / ln 2 is built once. An iteration
// is then u = 1 / (K v), v = 1 / (K^T u): one sweep over K, in which a block of rows meets v and,
// while it is still in the L1 cache, adds u_i K_i to the column sums. plan = u_i K_ij v_j.
//
// Stability. a and b are integers, so they cost no digits and absorb any scale exactly. Every
// iteration checks that its row and column sums stay within [1e-14, 1e14]: entries of K below
// float32's range then add less than 1e-10 to any entry of the plan. An iteration that fails is
// repeated with a maximum per row and per column (a log-sum-exp in base two), and K is rebuilt with
// the new a and b. epsilon = 1 never needs that; 0.01 may, on widely spread similarities.
#pragma once

#include "../common/sinkhorn_settling.h"
#include "arena.h"
#include "sinkhorn.h"
#include "vector.h"

namespace mghf {
namespace {

constexpr float kSmallestSum = 1e-14f, kLargestSum = 1e14f;
constexpr float kLargestExponent = 4194304.0f;  // 2^22: round_to_integer() is right up to there
constexpr float kNoExponent = -1e9f;

// What a solver does for an op, besides the options of `sinkhorn`.
struct SolverUse {
  bool keep;      // keep every iterate, for the gradient
  bool computed;  // the similarities are a product: rounded, `padded` apart, complete (see below)
  bool settle;    // stop where further iterations would change the result negligibly
};

struct Solver {
  const SinkhornOptions& options;
  const MatrixView similarity;
  const int64_t n;       // rows and columns
  const int64_t padded;  // n, rounded up to whole vectors and blocks
  const Factor factor;   // score to exponent of two
  const SolverUse use;

  // K, block by block of kRows rows; within a block vector by vector, the rows of one vector side
  // by side: a sweep reads the memory from one end to the other.
  float* kernel;
  float* rows;       // kRows rows of an input or the output
  float* exponents;  // their scores, split
  float* powers;
  float* padding;    // 0, and 1 beyond n: keeps the sums of padding away from 0
  float* row_sums;   // of the previous iterate
  float* scratch;
  float* u_history;  // u and v after each iteration; only the last two unless use.keep
  float* v_history;
  float* a_history;  // the bases (exponents) that K has had, and each iteration's
  float* b_history;
  float* base_of;

  Solver(const SinkhornOptions& options, MatrixView similarity, SolverUse use, Arena& arena)
      : options(options),
        similarity(similarity),
        n(options.size),
        padded(round_up(n, kLanes)),
        factor(make_factor((options.cost == TransportCost::easy ? -1 : 1) * 1.4426950408889634 /
                           options.epsilon)),
        use(use) {
    const int64_t iterates = use.keep ? options.iterations + 1 : 2;
    kernel = arena.floats(padded * padded);
    rows = arena.floats(kRows * padded);
    exponents = arena.floats(kRows * padded);
    powers = arena.floats(kRows * padded);
    padding = arena.floats(padded);
    row_sums = arena.floats(padded);
    scratch = arena.floats(padded);
    u_history = arena.floats(iterates * padded);
    v_history = arena.floats(iterates * padded);
    a_history = arena.floats(iterates * padded);
    b_history = arena.floats(iterates * padded);
    base_of = arena.floats(options.iterations + 1);
  }

  float* iterate(float* history, int64_t t) const {
    return history + (use.keep ? t : t & 1) * padded;
  }
  float* u(int64_t t) const { return iterate(u_history, t); }
  float* v(int64_t t) const { return iterate(v_history, t); }
  float* a(int64_t base) const { return iterate(a_history, base); }
  float* b(int64_t base) const { return iterate(b_history, base); }
  int64_t base(int64_t t) const { return static_cast<int64_t>(base_of[t]); }

  Vec& entry(int64_t i, int64_t j) const {
    const int64_t block = i / kRows, row = i % kRows;
    return at(kernel + block * kRows * padded + (j / kLanes * kRows + row) * kLanes);
  }

  // Copies rows i to i + kRows of a matrix into `rows`, zeros beyond it.
  void load_rows(MatrixView m, int64_t i) const {
    const int64_t count = n - i < kRows ? n - i : kRows;
    const float* source = m.data + i * m.row_stride;
    if (m.column_stride == 1) {
      for (int64_t r = 0; r < count; ++r) {
        __builtin_memcpy(rows + r * padded, source + r * m.row_stride,
                         static_cast<size_t>(n) * sizeof(float));
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t r = 0; r < count; ++r) {
          rows[r * padded + j] = source[r * m.row_stride + j * m.column_stride];
        }
      }
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = r < count ? n : 0; j < padded; ++j) rows[r * padded + j] = 0;
    }
  }

  // Gives the entries of row i without a score, on the diagonal and in the padding, the value of a
  // neighbour, so that maxima and checks need no mask.
  void complete_row(float* row, int64_t i) const {
    const float neighbour = row[i == 0 ? 1 : i - 1];
    row[i] = neighbour;
    for (int64_t j = n; j < padded; ++j) row[j] = neighbour;
  }

  // The scores of rows i to i + kRows, `padded` apart and complete.
  const float* scores(int64_t i) const {
    const float* source = rows;
    if (use.computed) {
      source = similarity.data + i * padded;
    } else {
      load_rows(similarity, i);
      for (int64_t r = 0; r < kRows && i + r < n; ++r) complete_row(rows + r * padded, i + r);
    }
    if (options.cost != TransportCost::exp) return source;
    for (int64_t r = 0; r < kRows && i + r < n; ++r) {
      for (int64_t j = r * padded; j < (r + 1) * padded; j += kLanes) {
        at(rows + j) = -exponential(at(source + j));
      }
    }
    return rows;
  }

  // Sets K's entries that have no score to 0.
  void clear_diagonal_and_padding(int64_t i) const {
    for (int64_t r = 0; r < kRows; ++r) {
      if (i + r >= n) {
        for (int64_t j = 0; j < padded; j += kLanes) entry(i + r, j) = Vec{};
        continue;
      }
      entry(i + r, i + r)[(i + r) % kLanes] = 0;
      for (int64_t j = n; j < padded; ++j) entry(i + r, j)[j % kLanes] = 0;
    }
  }

  // Builds the first K from similarities that prepare(i) computes, rows i to i + kRows at a time:
  // prepare puts the maxima of y, rounded, into a and returns whether all are finite and small
  // enough. Such similarities are rounded anyway, so their products with factor.high may be too.
  template <class Prepare>
  bool build_computed_kernel(const Prepare& prepare) const {
    bool right = true;
    for (int64_t i = 0; i < padded; i += kRows) {
      right &= prepare(i);
      const float* block = scores(i);
      for (int64_t r = 0; r < kRows && i + r < n; ++r) {
        const float* row = block + r * padded;
        const float row_exponent = a(0)[i + r];
        for (int64_t j = 0; j < padded; j += kLanes) {
          const Vec x = (at(row + j) * factor.high - row_exponent) + at(row + j) * factor.low;
          at(kernel + i * padded + j * kRows + r * kLanes) =
              small_power_of_two(max(x, splat(-125)));
        }
      }
      clear_diagonal_and_padding(i);
    }
    return right;
  }

  // Builds K with the exponents a (which it sets to the rows' maxima if `first`) and b. Returns
  // whether all scores are finite and small enough to differ.
  bool build_kernel(int64_t base, bool first) const {
    float* row_exponent = a(base);
    const float* column_exponent = b(base);
    Vec bad = {}, extreme = {};
    for (int64_t i = 0; i < padded; i += kRows) {
      const float* block = scores(i);
      for (int64_t r = 0; r < kRows && i + r < n; ++r) {
        const float* row = block + r * padded;
        if (first) {
          Vec top = splat(-kLargestExponent);
          for (int64_t j = 0; j < padded; j += kLanes) {
            const Vec y = at(row + j) * factor.value;
            bad += y * 0.0f;  // NaN if y is infinite or NaN
            extreme = max(extreme, abs(y));
            top = max(top, y);
          }
          row_exponent[i + r] = round_to_integer(splat(largest(top)))[0];
        }
        for (int64_t j = 0; j < padded; j += kLanes) {
          const Power p = power_of_two(at(row + j), factor);
          entry(i + r, j) =
              p.power * scale(p.exponent - row_exponent[i + r] - at(column_exponent + j));
        }
      }
      clear_diagonal_and_padding(i);
    }
    return sum(bad) == 0 && largest(extreme) < kLargestExponent;
  }

  // The pass over K that all steps use: with r_i = sum_j K_ij weights_j, it adds
  // coefficient(i, r_i) K_ij to sums_j. `coefficients(i, r, c)` fills c for kRows rows from i. The
  // sums of block k + 1 are computed in the same loop as the additions of block k, so that one is
  // loaded while the other is computed.
  template <class Coefficients>
  [[gnu::noinline]]  // its inner loop needs every register
  void sweep(const float* weights, float* sums, const Coefficients& coefficients) const {
    alignas(64) float c[kRows];
    Vec r[kRows] = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec* block = &at(kernel + j * kRows);
      for (int64_t k = 0; k < kRows; ++k) r[k] += block[k] * at(weights + j);
    }
    int64_t i = 0;
    for (; i + kRows < padded; i += kRows) {
      coefficients(i, horizontal_sums(r), c);
      Vec factors[kRows];
      for (int64_t k = 0; k < kRows; ++k) {
        factors[k] = splat(c[k]);
        r[k] = Vec{};
      }
      const float* current = kernel + i * padded;
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec* block = &at(current + j * kRows);
        const Vec* next = block + kRows * padded / kLanes;
        const Vec weight = at(weights + j);
        Vec total = at(sums + j);
        for (int64_t k = 0; k < kRows; ++k) {
          total += factors[k] * block[k];
          r[k] += next[k] * weight;
        }
        at(sums + j) = total;
      }
    }
    coefficients(i, horizontal_sums(r), c);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec* block = &at(kernel + i * padded + j * kRows);
      Vec total = at(sums + j);
      for (int64_t k = 0; k < kRows; ++k) total += c[k] * block[k];
      at(sums + j) = total;
    }
  }

  // Iteration t in the exponential domain; false if it leaves the safe range.
  bool iterate_fast(int64_t t, float* error) const {
    float *new_u = u(t), *new_v = v(t);
    for (int64_t j = 0; j < padded; j += kLanes) at(new_v + j) = at(padding + j);
    sweep(v(t - 1), new_v, [&](int64_t i, Vec r, float(&c)[kRows]) {
      for (int64_t k = 0; k < kRows; ++k) {
        const float row_sum = r[k] + padding[i + k];
        row_sums[i + k] = row_sum;
        new_u[i + k] = c[k] = 1.0f / row_sum;
      }
    });
    Vec least = splat(1), most = splat(1), deviation = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec column = at(new_v + j), row = at(row_sums + j);
      least = min(least, min(column, row));
      most = max(most, max(column, row));
      // u is the previous iterate's, so this is the row sum of its plan.
      deviation = max(deviation, abs(at(u(t - 1) + j) * row - 1.0f));
      at(new_v + j) = 1.0f / column;
    }
    *error = largest(deviation);
    return smallest(least) >= kSmallestSum && largest(most) <= kLargestSum;
  }

  // The spread of the changes of v in iteration t. Those of the padding are 1, their mean.
  float spread_of_changes(int64_t t) const {
    Vec lowest = splat(1e30f), highest = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec change = at(v(t - 1) + j) / at(v(t) + j);
      lowest = min(lowest, change);
      highest = max(highest, change);
    }
    return largest(highest) - smallest(lowest);
  }

  // Splits the scores of rows i to i + kRows into `exponents` and `powers`; where there is no score
  // the exponent is far below all others and the power 0.
  void split_scores(int64_t i) const {
    const float* block = scores(i);
    for (int64_t r = 0; r < kRows && i + r < n; ++r) {
      float *exponent = exponents + r * padded, *power = powers + r * padded;
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Power p = power_of_two(at(block + r * padded + j), factor);
        at(exponent + j) = p.exponent;
        at(power + j) = p.power;
      }
      exponent[i + r] = kNoExponent;
      power[i + r] = 0;
      for (int64_t j = n; j < padded; ++j) {
        exponent[j] = kNoExponent;
        power[j] = 0;
      }
    }
  }

  // Iteration t with the maximum exponent of every row and column factored out, from the exponents
  // a and b of `old_base` to those of old_base + 1.
  void iterate_robust(int64_t t, int64_t old_base, float* error) const {
    const float *old_u = u(t - 1), *old_a = a(old_base);
    float *new_u = u(t), *new_v = v(t), *new_a = a(old_base + 1), *new_b = b(old_base + 1);
    // v 2^-b again, with v in [1, 2)
    float *v_mantissa = row_sums, *v_exponent = scratch;
    for (int64_t j = 0; j < padded; j += kLanes) {
      const IntVec bits = reinterpret_cast<IntVec>(at(v(t - 1) + j));
      at(v_mantissa + j) = reinterpret_cast<Vec>((bits & 0x7fffff) | 0x3f800000);
      at(v_exponent + j) =
          __builtin_convertvector((bits >> 23) - 127, Vec) - at(b(old_base) + j);
      at(new_u + j) = splat(1);
      at(new_a + j) = Vec{};
      at(new_b + j) = splat(2 * kNoExponent);
    }
    *error = 0;
    for (int64_t i = 0; i < n; i += kRows) {
      split_scores(i);
      for (int64_t k = 0; k < kRows && i + k < n; ++k) {
        const float *exponent = exponents + k * padded, *power = powers + k * padded;
        Vec top = splat(2 * kNoExponent), total = {};
        for (int64_t j = 0; j < padded; j += kLanes) {
          top = max(top, at(exponent + j) + at(v_exponent + j));
        }
        const float row_exponent = largest(top);
        for (int64_t j = 0; j < padded; j += kLanes) {
          const Vec e = at(exponent + j) - row_exponent;
          total += at(power + j) * at(v_mantissa + j) * scale(e + at(v_exponent + j));
          at(new_b + j) = max(at(new_b + j), e);
        }
        const float row_sum = sum(total);
        const float deviation =
            old_u[i + k] * row_sum * scale(row_exponent - old_a[i + k]) - 1.0f;
        const float size = deviation < 0 ? -deviation : deviation;
        *error = size > *error ? size : *error;
        new_a[i + k] = row_exponent;
        new_u[i + k] = 1.0f / row_sum;
      }
    }
    for (int64_t j = 0; j < padded; j += kLanes) at(new_v + j) = at(padding + j);
    for (int64_t i = 0; i < n; i += kRows) {
      split_scores(i);
      for (int64_t k = 0; k < kRows && i + k < n; ++k) {
        for (int64_t j = 0; j < padded; j += kLanes) {
          at(new_v + j) += new_u[i + k] * at(powers + k * padded + j) *
                           scale(at(exponents + k * padded + j) - new_a[i + k] - at(new_b + j));
        }
      }
    }
    for (int64_t j = 0; j < padded; j += kLanes) at(new_v + j) = 1.0f / at(new_v + j);
    for (int64_t j = n; j < padded; ++j) new_b[j] = 0;
  }

  // Sets the iterate before the first, and K. False if the similarities cannot be handled.
  template <class Prepare>
  bool start(const Prepare& prepare) const {
    for (int64_t j = 0; j < padded; ++j) {
      padding[j] = j < n ? 0.0f : 1.0f;
      u(0)[j] = v(0)[j] = 1;
      a(0)[j] = b(0)[j] = 0;
    }
    base_of[0] = 0;
    return use.computed ? build_computed_kernel(prepare) : build_kernel(0, true);
  }

  // As solve(), from the iterates that it kept; those that did not fit are repeated.
  template <class Prepare>
  int64_t resume(const Prepare& prepare, const KeptIterates& kept) const {
    const int64_t made = kept.made();
    if (made < 1 || made > options.iterations) return solve(prepare);
    if (!start(prepare)) return -1;
    for (int64_t t = 1; t <= made; ++t) {
      base_of[t] = 0;
      float error = 0;
      if (t > kept.slots) {
        if (!iterate_fast(t, &error)) return solve(prepare);
        continue;
      }
      for (int64_t j = 0; j < padded; ++j) {
        u(t)[j] = j < n ? kept.vector(t, 0, n)[j] : 1;
        v(t)[j] = j < n ? kept.vector(t, 1, n)[j] : 1;
      }
    }
    return made;
  }

  // Runs the iterations; returns how many counted, or -1 if the similarities cannot be handled.
  // prepare(i) computes the similarities of rows i to i + kRows if use.computed (see above).
  // With use.settle the iterations end once further ones would change the result negligibly: their
  // u and v are taken to equal the last ones. Stores iterates in `kept`, if given, unless K had
  // several bases.
  template <class Prepare>
  int64_t solve(const Prepare& prepare, const KeptIterates* kept = nullptr) const {
    if (kept != nullptr) kept->clear(n);
    if (!start(prepare)) return -1;
    Settling settling;
    for (int64_t t = 1; t <= options.iterations; ++t) {
      int64_t current = base(t - 1);
      float error = 0;
      const bool fast = iterate_fast(t, &error);
      if (!fast) iterate_robust(t, current, &error);
      // The error is that of iterate t - 1; the first iteration has none.
      if (options.has_tolerance && t > 1 && error <= options.tolerance) return t - 1;
      if (!fast) build_kernel(++current, false);
      base_of[t] = current;
      if (kept != nullptr) kept->made() = current == 0 ? static_cast<int32_t>(t) : 0;
      if (kept != nullptr && current == 0 && t <= kept->slots) {
        const auto bytes = static_cast<size_t>(n) * sizeof(float);
        __builtin_memcpy(kept->vector(t, 0, n), u(t), bytes);
        __builtin_memcpy(kept->vector(t, 1, n), v(t), bytes);
      }
      if (use.settle && current == 0 &&
          settling.settled(static_cast<int>(t), spread_of_changes(t))) {
        return t;
      }
    }
    return options.iterations;
  }

  void store_rows(int64_t i, float* out) const {
    for (int64_t r = 0; r < kRows && i + r < n; ++r) {
      __builtin_memcpy(out + (i + r) * n, rows + r * padded,
                       static_cast<size_t>(n) * sizeof(float));
    }
  }
};

// ---- the gradient ----

// The gradient of log K and of u and v through all iterations, from W, that of log plan. The caller
// puts sum_j W_ij into df and sum_i W_ij into dg and calls sweep_back() and correct(), or it calls
// robust().
struct Gradient {
  const Solver& s;
  const int64_t T;
  const int64_t settled;  // iterations that the solver made; u and v of any after it equal its last
  int64_t first = 1, last = 0;  // the terms that sweep_back() computes
  // Per term: v dg (which the columns of B are weighted with) and u df (the rows of A). The term of
  // an iteration has its number, the sum of those after `settled` is settled + 1; 0 is scratch.
  float *weighted_dg, *weighted_df;
  float *df, *dg;

  Gradient(const Solver& s, int64_t T, int64_t settled, Arena& arena)
      : s(s), T(T), settled(settled) {
    weighted_dg = arena.floats((T + 1) * s.padded);
    weighted_df = arena.floats((T + 1) * s.padded);
    df = arena.floats(s.padded);
    dg = arena.floats(s.padded);
  }

  int64_t iterate(int64_t t) const { return t < settled ? t : settled; }

  // For iterations that all have the first base: sweeps as in the forward. They end when the
  // deviations of dg from its mean add up to less than `negligible` over the remaining iterations:
  // A and B are averages, so the sum of |dg| never grows, and an equal dg in all columns cancels.
  void sweep_back(float negligible) {
    const int64_t padded = s.padded;
    first = last = iterate(T) + (T > settled);
    for (int64_t j = 0; T > settled && j < padded; j += kLanes) {
      at(weighted_dg + last * padded + j) = at(weighted_df + last * padded + j) = Vec{};
    }
    for (int64_t t = T; t >= 1; --t) {
      const bool grouped = t > settled;
      const float *u = s.u(iterate(t)), *v = s.v(iterate(t)), *previous_v = s.v(iterate(t - 1));
      float *wg = weighted_dg + (grouped ? 0 : t) * padded;
      float *wf = weighted_df + (grouped ? 0 : t) * padded;
      for (int64_t j = 0; j < padded; j += kLanes) {
        at(wg + j) = at(v + j) * at(dg + j);
        at(dg + j) = Vec{};
      }
      s.sweep(wg, dg, [&](int64_t i, Vec r, float(&c)[kRows]) {
        for (int64_t k = 0; k < kRows; ++k) {
          wf[i + k] = c[k] = u[i + k] * (df[i + k] - u[i + k] * r[k]);
          df[i + k] = 0;
        }
      });
      for (int64_t j = 0; j < padded; j += kLanes) at(dg + j) *= -at(previous_v + j);
      first = grouped ? last : t;
      if (grouped) {
        for (int64_t j = 0; j < padded; j += kLanes) {
          at(weighted_dg + last * padded + j) += at(wg + j);
          at(weighted_df + last * padded + j) += at(wf + j);
        }
      }
      if (negligible > 0 && static_cast<float>(t) * spread_of_dg() <= negligible) break;
    }
  }

  float spread_of_dg() const {
    Vec total = {}, spread = {};
    for (int64_t j = 0; j < s.padded; j += kLanes) total += at(dg + j);
    const float mean = sum(total) / static_cast<float>(s.n);
    for (int64_t j = 0; j < s.padded; j += kLanes) {
      spread += abs(at(dg + j) - mean) * (1.0f - at(s.padding + j));
    }
    return sum(spread);
  }

  // Computes the terms' sums c of kRows rows from i on,
  //   dlogK_ij = W_ij - K_ij c_ij,  c_ij = sum_t u^t_i (v^t dg^t)_j + (u^t df^t)_i v^(t-1)_j:
  // calls combine(k, j, c) for every row i + k and vector j.
  template <class Combine>
  void correct(int64_t i, const Combine& combine) const {
    int64_t j = 0;
    for (; j + 3 * kLanes <= s.padded; j += 3 * kLanes) correct<3>(i, j, combine);
    for (; j < s.padded; j += kLanes) correct<1>(i, j, combine);
  }

  template <int64_t kVectors, class Combine>
  void correct(int64_t i, int64_t j, const Combine& combine) const {
    const int64_t padded = s.padded;
    Vec total[kRows][kVectors] = {};
    for (int64_t t = first; t <= last; ++t) {
      const float *u = s.u(iterate(t)) + i, *wf = weighted_df + t * padded + i;
      const float *wg = weighted_dg + t * padded + j, *previous_v = s.v(iterate(t - 1)) + j;
      for (int64_t k = 0; k < kRows; ++k) {
        for (int64_t l = 0; l < kVectors; ++l) total[k][l] += u[k] * at(wg + l * kLanes);
      }
      for (int64_t k = 0; k < kRows; ++k) {
        for (int64_t l = 0; l < kVectors; ++l) total[k][l] += wf[k] * at(previous_v + l * kLanes);
      }
    }
    for (int64_t k = 0; k < kRows; ++k) {
      for (int64_t l = 0; l < kVectors; ++l) combine(k, j + l * kLanes, total[k][l]);
    }
  }

  // For any bases: the reference's recursion, every entry of A and B as an exponential of its own.
  // load(i) puts W of rows i to i + kRows into `rows`; the gradient of log K takes the place of K.
  template <class Load>
  void robust(const Load& load) const {
    const int64_t n = s.n, padded = s.padded;
    for (int64_t j = 0; j < padded; j += kLanes) at(df + j) = at(dg + j) = Vec{};
    for (int64_t i = 0; i < n; i += kRows) {
      load(i);
      for (int64_t k = 0; k < kRows && i + k < n; ++k) {
        Vec total = {};
        for (int64_t j = 0; j < padded; j += kLanes) {
          const Vec w = at(s.rows + k * padded + j);
          total += w;
          at(dg + j) += w;
          s.entry(i + k, j) = w;
        }
        df[i + k] = sum(total);
      }
    }
    float *new_dg = weighted_dg, *bdg = weighted_df;
    for (int64_t t = T; t >= 1; --t) {
      const float *a = s.a(s.base(t)), *b = s.b(s.base(t)), *previous_b = s.b(s.base(t - 1));
      const float *u = s.u(t), *v = s.v(t), *previous_v = s.v(t - 1);
      for (int64_t j = 0; j < padded; j += kLanes) {
        at(new_dg + j) = Vec{};
        at(bdg + j) = at(v + j) * at(dg + j);
      }
      for (int64_t i = 0; i < n; i += kRows) {
        s.split_scores(i);
        for (int64_t k = 0; k < kRows && i + k < n; ++k) {
          float *exponent = s.exponents + k * padded, *power = s.powers + k * padded;
          Vec total = {};
          for (int64_t j = 0; j < padded; j += kLanes) {
            at(exponent + j) -= a[i + k];
            at(power + j) *= u[i + k];
            const Vec column =
                at(power + j) * scale(at(exponent + j) - at(b + j)) * at(bdg + j);
            total += column;
            s.entry(i + k, j) -= column;
          }
          const float row_df = df[i + k] - sum(total);
          df[i + k] = 0;
          for (int64_t j = 0; j < padded; j += kLanes) {
            const Vec row = at(power + j) * scale(at(exponent + j) - at(previous_b + j)) *
                            at(previous_v + j) * row_df;
            s.entry(i + k, j) -= row;
            at(new_dg + j) -= row;
          }
        }
      }
      for (int64_t j = 0; j < padded; j += kLanes) at(dg + j) = at(new_dg + j);
    }
  }
};

}  // namespace
}  // namespace mghf
