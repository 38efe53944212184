// The contrastive loss of one map whose negatives a transport plan weighs, and its gradient, on the
// CPU. See mghf_fast/reference/monce.py for the mathematics.
//
// Forward. s = q k^T, a few rows of queries at a time; Sinkhorn's K is built on each block of rows
// while it is in the L1 cache, and sinkhorn_solver.h finds u and v. With w_ij = K_ij v_j E_ij and
// E_ij = e^((s_ij - max_j s_ij) / t), the sum of the negatives of a row is Q (N-1) u_i sum_j w_ij
// times e^(max_j s_ij / t), and
//   loss_i = softplus(x_i),  x_i = (max_j s_ij - s_ii) / t + ln(Q (N-1) u_i sum_j w_ij):
// nothing overflows, whatever the temperature, and small losses keep their digits.
//
// Backward. s is recomputed, u and v are those that the forward saved. With row weights
// r_i = grad_i sigmoid(x_i) the gradient of log plan is W_ij = r_i w_ij / sum_j w_ij, whose rows
// add up to r_i. Then follow Gradient's recursion through the iterations and, by blocks of rows and
// never as a whole matrix,
//   ds_ij = W_ij / t + (W_ij - K_ij c_ij) dscore/ds / epsilon,  ds_ii = -r_i / t,  dq = ds k.
//
// Forward and recursion skip iterations that would change the result by less than 1e-6 (see
// Solver::solve and Gradient::sweep_back). At epsilon = 1 about four of fifty remain, and most of
// the time goes into the products: N^2 D multiply-adds forward, twice as many backward. K and s are
// the only N x N matrices, one pair for each thread.
//
// Where K or v covers too many powers of two for w to be a float32, `weigh_widely` adds the
// exponents of all factors before it takes the power.
//
// This file is compiled once per instruction set, as MGHF_KERNELS, so everything in it has internal
// linkage (see vector.h).

#include "monce.h"

#include "pixels.h"
#include "product.h"
#include "sinkhorn_solver.h"

namespace mghf {
namespace {

constexpr float kNaN = __builtin_nanf("");
constexpr float kNegligible = 5e-7f;  // relative part of the gradient that may be left out

// ---- elementary functions ----

// ln((1 + f) / (1 - f)) for |f| <= 1/3, fitted at Chebyshev nodes: relative error 8e-9.
inline Vec twice_artanh(Vec f) {
  const Vec z = f * f;
  Vec p = splat(0.28157779574394226f);
  p = p * z + 0.27965158224105835f;
  p = p * z + 0.4002459645271301f;
  p = p * z + 0.6666632294654846f;
  p = p * z + 2.0f;
  return p * f;
}

// Natural logarithm of normal numbers.
inline Vec logarithm(Vec x) {
  const IntVec bits = reinterpret_cast<IntVec>(x);
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;  // leaves a mantissa of sqrt(1/2) to sqrt(2)
  const Vec mantissa = reinterpret_cast<Vec>(bits - (exponent << 23));
  const Vec e = __builtin_convertvector(exponent, Vec);
  return e * 0.693359375f + (twice_artanh((mantissa - 1.0f) / (mantissa + 1.0f)) -
                             e * 0.00021219444005469057f);
}

// e^-|x|; 0 below float32's range, NaN for NaN.
inline Vec decay(Vec x) { return exponential(max(splat(-200.0f), -abs(x))); }

// ln(1 + e^x)
inline Vec softplus(Vec x) {
  const Vec y = decay(x);
  return max(x, Vec{}) + twice_artanh(y / (y + 2.0f));
}

inline Vec sigmoid(Vec x) {
  const Vec y = decay(x);
  return (x > 0.0f ? splat(1) : y) / (y + 1.0f);
}

// ---- one map ----

constexpr int kPanel = 3;  // vectors of columns that a product takes at a time

// Covers `vectors` with panels of 3, 2 or 1: calls visit.template operator()<kN>(first).
template <class Visit>
inline void for_each_panel(int64_t vectors, const Visit& visit) {
  int64_t first = 0;
  // The last four become two panels of two: a panel of one vector loads as much as it multiplies.
  for (; vectors - first >= kPanel && vectors - first != 4; first += kPanel) {
    visit.template operator()<kPanel>(first);
  }
  for (; vectors - first >= 2; first += 2) visit.template operator()<2>(first);
  if (first < vectors) visit.template operator()<1>(first);
}

// Whether the plan has a gradient. With two patches each can only be moved to the other.
bool differentiates_plan(const MonceOptions& options) {
  return options.differentiate_plan && options.sinkhorn.size > 2;
}

struct Map {
  const MonceOptions& options;
  const MatrixView query, key;
  const int64_t n, padded, depth;
  const float inverse_temperature;  // 1 / t
  const float log2_slope;           // 1 / (t ln 2): from s to exponents of two
  const float log_weight;           // ln(Q (N-1))

  float* similarity;  // s, `padded` apart, complete (see Solver)
  float* panels;      // of k^T and, later, of k: columns side by side for the products
  float* positive;    // s_ii
  float* highest;     // max_j s_ij, j != i
  float* lowest;
  const Solver solver;
  float* v_mantissa;  // v 2^-b, for weigh_widely()
  float* v_exponent;
  float* row_weight;  // r_i
  float* row_scale;   // r_i / sum_j w_ij

  Map(const MonceOptions& options, MatrixView query, MatrixView key, bool backward, Arena& arena)
      : options(options),
        query(query),
        key(key),
        n(options.sinkhorn.size),
        padded(round_up(n, kLanes)),
        depth(options.depth),
        inverse_temperature(static_cast<float>(1 / options.temperature)),
        log2_slope(static_cast<float>(1.4426950408889634 / options.temperature)),
        log_weight(static_cast<float>(
            __builtin_log(options.negative_weight * static_cast<double>(n - 1)))),
        similarity(arena.floats(padded * padded)),
        panels(arena.floats(padded * round_up(depth, kLanes))),
        positive(arena.floats(padded)),
        highest(arena.floats(padded)),
        lowest(arena.floats(padded)),
        solver(options.sinkhorn, {similarity, padded, 1},
               {.keep = backward && differentiates_plan(options), .computed = true, .settle = true},
               arena),
        v_mantissa(arena.floats(padded)),
        v_exponent(arena.floats(padded)),
        row_weight(arena.floats(padded)),
        row_scale(arena.floats(padded)) {}

  // ---- the similarities ----

  // Packs k^T (k if `rows`) into panels of columns: a few vectors of each row, row after row.
  void pack_key(bool rows) const {
    const int64_t count = rows ? depth : n, length = rows ? n : depth;
    const int64_t column_step = rows ? key.column_stride : key.row_stride;
    const int64_t row_step = rows ? key.row_stride : key.column_stride;
    float* panel = panels;
    for_each_panel(round_up(count, kLanes) / kLanes, [&]<int kN>(int64_t first) {
      constexpr int64_t width = kN * kLanes;
      const int64_t start = first * kLanes, left = count - start;
      const int64_t columns = left < width ? left : width;
      read_pixels(key.data + start * column_step, row_step, column_step, length, columns, panel,
                  width);
      for (int64_t k = 0; columns < width && k < length; ++k) {
        for (int64_t j = columns; j < width; ++j) panel[k * width + j] = 0;
      }
      panel += length * width;
    });
  }

  // Rows i to i + kM of s.
  template <int kM>
  void multiply_rows(int64_t i) const {
    const float* panel = panels;
    for_each_panel(padded / kLanes, [&]<int kN>(int64_t first) {
      Vec block[kM][kN] = {};
      multiply_add<kM, kN>(block, query.data + i * query.row_stride, query.row_stride,
                           query.column_stride, panel, kN * kLanes, depth);
      for (int64_t m = 0; m < kM; ++m) {
        for (int64_t j = 0; j < kN; ++j) {
          at(similarity + (i + m) * padded + (first + j) * kLanes) = block[m][j];
        }
      }
      panel += kN * kLanes * depth;
    });
  }

  // Computes rows i to i + kRows of s, their extremes and, into a, the rounded maxima of y (see
  // Solver). False if any entry is infinite, NaN or too large.
  bool compare(int64_t i) const {
    const int64_t count = i >= n ? 0 : n - i < kRows ? n - i : kRows;
    float* s = similarity + i * padded;
    if (count == kRows) {
      multiply_rows<kRows>(i);
    } else {
      for (int64_t r = 0; r < count; ++r) multiply_rows<1>(i + r);
      for (int64_t j = count * padded; j < kRows * padded; j += kLanes) at(s + j) = Vec{};
    }
    for (int64_t r = 0; r < kRows; ++r) {
      positive[i + r] = r < count ? s[r * padded + i + r] : 0;
      if (r < count) solver.complete_row(s + r * padded, i + r);
    }
    Vec bad[4] = {}, tops[kRows], bottoms[kRows];
    for (int64_t r = 0; r < kRows; ++r) tops[r] = bottoms[r] = at(s + r * padded);
    for (int64_t j = 0; j < padded; j += kLanes) {
      for (int64_t r = 0; r < kRows; ++r) {
        const Vec entry = at(s + r * padded + j);
        bad[r % 4] += entry * 0.0f;  // NaN if it is infinite or NaN
        tops[r] = max(tops[r], entry);
        bottoms[r] = min(bottoms[r], entry);
      }
    }
    const Vec top = horizontal(tops, [](Vec a, Vec b) { return max(a, b); });
    const Vec bottom = horizontal(bottoms, [](Vec a, Vec b) { return min(a, b); });
    const Vec first = score(top) * solver.factor.value;
    const Vec second = score(bottom) * solver.factor.value;
    const Vec exponent = round_to_integer(max(first, second));
    const Vec size = max(abs(first), abs(second));
    float largest_size = 0;
    for (int64_t r = 0; r < kRows; ++r) {
      highest[i + r] = top[r];
      lowest[i + r] = bottom[r];
      solver.a(0)[i + r] = exponent[r];
      largest_size = size[r] > largest_size ? size[r] : largest_size;
    }
    return sum(bad[0] + bad[1] + bad[2] + bad[3]) == 0 && largest_size < kLargestExponent;
  }

  // The score that the plan maximises, without its sign, which the factor has, and without a
  // constant, which u absorbs.
  Vec score(Vec s) const {
    return options.sinkhorn.cost == TransportCost::exp ? -exponential(s) : s;
  }

  // Solves for the plan; returns the number of iterations, -1 if the similarities cannot be
  // handled.
  int64_t solve(const KeptIterates& kept) const {
    pack_key(false);
    return solver.solve([&](int64_t i) { return compare(i); }, &kept);
  }
  // The same, from the iterates that solve() kept.
  int64_t resume(const KeptIterates& kept) const {
    pack_key(false);
    return solver.resume([&](int64_t i) { return compare(i); }, kept);
  }

  // ---- the weights of the negatives ----

  // Whether the ranges of K's rows and of v keep w within float32's range, so that nothing that
  // counts in a row's sum underflows.
  bool is_narrow(int64_t t) const {
    if (solver.base(t) != 0) return false;
    Vec spread = {}, least = splat(1), most = splat(1);
    for (int64_t j = 0; j < padded; j += kLanes) {
      const Vec range = score(at(highest + j)) - score(at(lowest + j));
      spread = max(spread, abs(range * solver.factor.value));
      least = min(least, at(solver.v(t) + j));
      most = max(most, at(solver.v(t) + j));
    }
    return largest(spread) <= 40 && largest(most) <= 1e6f * smallest(least);
  }

  // The weights w of rows i to i + kRows, into `rows`, which may be those of s. Returns their sums,
  // 1 beyond n.
  Vec weigh_narrowly(int64_t i, const float* v, float* rows) const {
    const float* s = similarity + i * padded;
    const float* kernel = solver.kernel + i * padded;
    Vec sums[kRows];
    for (int64_t k = 0; k < kRows; ++k) {
      const float* row = s + k * padded;
      float* out = rows + k * padded;
      Vec total = {};
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec x = max((at(row + j) - highest[i + k]) * log2_slope, splat(-125));
        const Vec w = at(kernel + j * kRows + k * kLanes) * at(v + j) * small_power_of_two(x);
        at(out + j) = w;
        total += w;
      }
      sums[k] = total;
    }
    Vec result = horizontal_sums(sums);
    for (int64_t k = 0; k < kRows; ++k) result[k] += solver.padding[i + k];
    return result;
  }

  void split_v(int64_t t) const {
    const float* b = solver.b(solver.base(t));
    for (int64_t j = 0; j < padded; j += kLanes) {
      const IntVec bits = reinterpret_cast<IntVec>(at(solver.v(t) + j));
      at(v_mantissa + j) = reinterpret_cast<Vec>((bits & 0x7fffff) | 0x3f800000);
      at(v_exponent + j) = __builtin_convertvector((bits >> 23) - 127, Vec) - at(b + j);
    }
  }

  // The same, times 2^-exponents[k], with K recomputed as 2^y, without the rows' exponents a.
  Vec weigh_widely(int64_t i, float* rows, float (&exponents)[kLanes]) const {
    Vec result = splat(1);
    solver.split_scores(i);
    for (int64_t k = 0; k < kRows; ++k) {
      float* out = rows + k * padded;
      exponents[k] = 0;
      if (i + k >= n) {
        for (int64_t j = 0; j < padded; j += kLanes) at(out + j) = Vec{};
        continue;
      }
      const float* s = similarity + (i + k) * padded;
      float *exponent = solver.exponents + k * padded, *power = solver.powers + k * padded;
      Vec top = splat(4 * kNoExponent), total = {};
      for (int64_t j = 0; j < padded; j += kLanes) {
        const Vec x = max((at(s + j) - highest[i + k]) * log2_slope, splat(-kLargestExponent));
        const Vec e = round_to_integer(x);
        at(exponent + j) += e + at(v_exponent + j);
        at(power + j) *= at(v_mantissa + j) * small_power_of_two(x - e);
        top = max(top, at(exponent + j));
      }
      exponents[k] = largest(top);
      for (int64_t j = 0; j < padded; j += kLanes) {
        at(out + j) = at(power + j) * scale(at(exponent + j) - exponents[k]);
        total += at(out + j);
      }
      result[k] = sum(total);
    }
    return result;
  }

  // A plan, and whether weigh_narrowly() can weigh by it.
  struct Plan {
    int64_t t;
    bool narrow;
  };

  Plan plan_of(int64_t t) const {
    const bool narrow = is_narrow(t);
    if (!narrow) split_v(t);
    return {t, narrow};
  }

  struct Weighted {
    Vec sums, excess;  // sum_j w_ij and x_i of kRows rows
  };

  // The weights of rows i to i + kRows, into `rows`.
  Weighted weigh(int64_t i, Plan plan, float* rows) const {
    alignas(64) float exponents[kLanes] = {}, u[kLanes] = {}, distance[kLanes] = {};
    const Vec sums = plan.narrow ? weigh_narrowly(i, solver.v(plan.t), rows)
                                 : weigh_widely(i, rows, exponents);
    for (int64_t k = 0; k < kRows; ++k) {
      u[k] = solver.u(plan.t)[i + k];
      distance[k] = highest[i + k] - positive[i + k];
      if (!plan.narrow) exponents[k] -= solver.a(solver.base(plan.t))[i + k];
    }
    const Vec log_sums = logarithm(at(u) * sums) + at(exponents) * 0.6931471805599453f;
    return {sums, at(distance) * inverse_temperature + (log_sums + log_weight)};
  }

  // ---- the gradient ----

  // As weigh(), and r_i and r_i / sum_j w_ij.
  void weigh_for_gradient(int64_t i, Plan plan, VectorView grad, float* rows) const {
    const Weighted weighted = weigh(i, plan, rows);
    const Vec shares = sigmoid(weighted.excess);
    for (int64_t k = 0; k < kRows; ++k) {
      const float r = i + k < n ? grad.data[(i + k) * grad.stride] * shares[k] : 0;
      row_weight[i + k] = r;
      row_scale[i + k] = r / weighted.sums[k];
    }
  }

  // d score / d s / epsilon at the entries s.
  Vec slope(Vec s) const {
    const float magnitude = static_cast<float>(1 / options.sinkhorn.epsilon);
    switch (options.sinkhorn.cost) {
      case TransportCost::hard: return splat(magnitude);
      case TransportCost::easy: return splat(-magnitude);
      default: return exponential(s) * -magnitude;
    }
  }

  // The gradient through the weights and the positives, with the plan constant.
  void differentiate_detached(Plan plan, VectorView grad, float* grad_query) const {
    for (int64_t i = 0; i < n; i += kRows) {
      weigh_for_gradient(i, plan, grad, solver.rows);
      scale_rows(i, inverse_temperature);
      multiply_by_key(i, grad_query);
    }
  }

  // From w to W times a factor, in solver.rows.
  void scale_rows(int64_t i, float factor) const {
    for (int64_t k = 0; k < kRows; ++k) {
      const float scale = row_scale[i + k] * factor;
      for (int64_t j = 0; j < padded; j += kLanes) at(solver.rows + k * padded + j) *= scale;
    }
  }

  // The gradient, through the plan as well.
  void differentiate(Plan plan, VectorView grad, Gradient& gradient, float* grad_query) const {
    // After weighing only the slope of an exponential cost needs s; otherwise w takes its place.
    const bool in_place = plan.narrow && options.sinkhorn.cost != TransportCost::exp;
    const auto weights = [=, this](int64_t i) {
      return in_place ? similarity + i * padded : solver.rows;
    };
    float* dg = gradient.dg;
    for (int64_t j = 0; j < padded; j += kLanes) at(dg + j) = at(row_weight + j) = Vec{};
    for (int64_t i = 0; i < n; i += kRows) {
      const float* w = weights(i);
      weigh_for_gradient(i, plan, grad, weights(i));
      for (int64_t j = 0; j < padded; j += kLanes) {
        Vec total = at(dg + j);
        for (int64_t k = 0; k < kRows; ++k) total += row_scale[i + k] * at(w + k * padded + j);
        at(dg + j) = total;
      }
    }
    const bool on_first_base = solver.base(plan.t) == 0;
    if (on_first_base) {
      Vec total = {}, steepest = {};
      for (int64_t j = 0; j < padded; j += kLanes) {
        at(gradient.df + j) = at(row_weight + j);
        total += abs(at(row_weight + j));
        steepest = max(steepest, abs(slope(at(highest + j))));
      }
      // The sum of |ds| is at least that of |r| / t, from the diagonal alone.
      const float share = inverse_temperature / largest(steepest);
      gradient.sweep_back(kNegligible * sum(total) * (share < 1 ? share : 1));
    } else {
      gradient.robust([&](int64_t i) {
        weigh(i, plan, solver.rows);
        scale_rows(i, 1);
      });
    }
    for (int64_t i = 0; i < n; i += kRows) {
      if (!in_place) weigh(i, plan, solver.rows);
      const float *s = similarity + i * padded, *weight = weights(i);
      float* rows = solver.rows;
      const auto combine = [=, this](int64_t k, int64_t j, Vec grad_log_kernel, Vec w) {
        at(rows + k * padded + j) =
            w * inverse_temperature + grad_log_kernel * slope(at(s + k * padded + j));
      };
      if (on_first_base) {
        const float* kernel = solver.kernel + i * padded;
        gradient.correct(i, [=, this](int64_t k, int64_t j, Vec correction) {
          const Vec w = row_scale[i + k] * at(weight + k * padded + j);
          combine(k, j, w - at(kernel + j * kRows + k * kLanes) * correction, w);
        });
      } else {
        for (int64_t k = 0; k < kRows && i + k < n; ++k) {
          for (int64_t j = 0; j < padded; j += kLanes) {
            combine(k, j, solver.entry(i + k, j), row_scale[i + k] * at(weight + k * padded + j));
          }
        }
      }
      multiply_by_key(i, grad_query);
    }
  }

  // Rows i to i + kRows of dq = ds k, from those of ds in solver.rows, where only the diagonal is
  // missing.
  void multiply_by_key(int64_t i, float* grad_query) const {
    for (int64_t k = 0; k < kRows && i + k < n; ++k) {
      solver.rows[k * padded + i + k] = -row_weight[i + k] * inverse_temperature;
    }
    const float* panel = panels;
    for_each_panel(round_up(depth, kLanes) / kLanes, [&]<int kN>(int64_t first) {
      Vec block[kRows][kN] = {};
      multiply_add<kRows, kN>(block, solver.rows, padded, 1, panel, kN * kLanes, n);
      for (int64_t k = 0; k < kRows && i + k < n; ++k) {
        for (int64_t l = 0; l < kN; ++l) {
          const int64_t d = (first + l) * kLanes;
          float* out = grad_query + (i + k) * depth + d;
          if (d + kLanes <= depth) {
            store(out, block[k][l]);
          } else {
            for (int64_t lane = 0; d + lane < depth; ++lane) out[lane] = block[k][l][lane];
          }
        }
      }
      panel += kN * kLanes * n;
    });
  }
};

// ---- entry points ----

void forward(const MonceOptions& options, MatrixView query, MatrixView key, float* losses,
             KeptIterates kept, void* workspace) {
  const int64_t n = options.sinkhorn.size;
  if (n == 1) {  // no negatives, no loss
    float product = 0;
    for (int64_t d = 0; d < options.depth; ++d) {
      product += query.data[d * query.column_stride] * key.data[d * key.column_stride];
    }
    *losses = product * 0;
    kept.clear(n);
    return;
  }
  Arena arena{static_cast<char*>(workspace)};
  const Map map(options, query, key, false, arena);
  const int64_t t = map.solve(kept);
  if (t < 0) {
    for (int64_t i = 0; i < n; ++i) losses[i] = kNaN;
    return;
  }
  const Map::Plan plan = map.plan_of(t);
  for (int64_t i = 0; i < n; i += kRows) {
    const Vec loss = softplus(map.weigh(i, plan, map.solver.rows).excess);
    for (int64_t k = 0; k < kRows && i + k < n; ++k) losses[i + k] = loss[k];
  }
}

void backward(const MonceOptions& options, VectorView grad, MatrixView query, MatrixView key,
              KeptIterates kept, float* grad_query, void* workspace) {
  const int64_t n = options.sinkhorn.size, depth = options.depth;
  if (n == 1) {
    for (int64_t d = 0; d < depth; ++d) {
      grad_query[d] = query.data[d * query.column_stride] * 0 * *grad.data;
    }
    return;
  }
  Arena arena{static_cast<char*>(workspace)};
  const Map map(options, query, key, true, arena);
  const int64_t t = map.resume(kept);
  if (t < 0) {
    for (int64_t i = 0; i < n * depth; ++i) grad_query[i] = kNaN;
    return;
  }
  const Map::Plan plan = map.plan_of(t);
  map.pack_key(true);
  if (differentiates_plan(options)) {
    Gradient gradient(map.solver, options.sinkhorn.iterations, t, arena);
    map.differentiate(plan, grad, gradient, grad_query);
  } else {
    map.differentiate_detached(plan, grad, grad_query);
  }
}

size_t workspace_bytes(const MonceOptions& options, bool with_gradient) {
  Arena arena{nullptr};
  const Map map(options, {}, {}, with_gradient, arena);
  const int64_t iterations = options.sinkhorn.iterations;
  if (with_gradient && differentiates_plan(options)) {
    Gradient(map.solver, iterations, iterations, arena);
  }
  return arena.used;
}

}  // namespace

const MonceKernels MGHF_KERNELS = {workspace_bytes, forward, backward};

}  // namespace mghf
