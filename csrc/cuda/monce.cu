// The patch contrastive loss with transported negatives, and its gradient.
//
//     s_ij = <q_i, k_j>,   K, u, v: see sinkhorn_solver.h,   E_ij = e^((s_ij - max_j s_ij) / t)
//     w_ij = K_ij v_j E_ij
//     x_i = (max_j s_ij - s_ii) / t + ln(Q (N-1) u_i sum_j w_ij)          loss_i = softplus(x_i)
//     r_i = grad_i sigmoid(x_i),   W_ij = r_i w_ij / sum_j w_ij
//     ds_ij = W_ij / t + (W_ij - K_ij c_ij) dscore/ds / epsilon,   ds_ii = -r_i / t,   dq = ds k
//
// with c_ij from the solver's recursion. Nothing overflows, whatever the temperature, and small
// losses keep their digits.
//
// One launch forward and one backward. A block computes s of its rows by tensor cores into the
// place of K whenever it is needed, which is cheaper than keeping both: before the iterations,
// after them, and in the backward also for ds, which takes the place of s and is multiplied by the
// keys from there. No N x N matrix is written to device memory, unless it does not fit on chip.
//
// Where K or v covers too many powers of two for w to be a float32, the exponents of all factors
// are added before the power is taken.
//
// Maps of 2 to 32 patches are those of monce_warp.h instead; on GPUs with products of warpgroups
// those of 33 to 1792 patches are monce_cluster.h's; and others that fit one block's shared memory
// without K are monce_chip.h's. All of these make a map NaN whose sums leave float32's range, as
// those of embeddings much longer than 1 may. The host cannot know them without waiting, so the
// kernels here follow and solve the maps that are NaN.
//
// Predicted floor for B = 128, N = 441, D = 64, float32 on an H200: 29 MB read, 6 us at 4.3 TB/s;
// 1.6 G multiply-adds for each s, as three products of TF32 33 us at 300 TFLOP/s. In each of four
// rounds of 33 clusters: s in 14 us, bound by the loads of its operands, K in 7, an iteration or a
// sweep of the recursion in 1.8, the weights in 11, dq in 12. Forward two s, K, 7 iterations and
// the weights: 60 us, 0.25 ms in all; backward three s, K twice, 15 sweeps, the weights three
// times, the terms' sums and dq: 150 us, 0.6 ms in all.
#include "monce.h"

#include "monce_chip.h"
#include "monce_cluster.h"
#include "monce_warp.h"
#include "patch_product.h"
#include "sinkhorn_gradient.h"
#include "variants.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = kMostWarps * kWarp;
// Relative part of the gradient that the recursion may leave out.
constexpr float kNegligible = 5e-7f;
constexpr float kLn2 = 0.6931471805599453f;

struct Terms {
  float inverse_temperature, log2_slope;  // 1 / t, 1 / (t ln 2)
  float log_weight;                       // ln(Q (N-1))
  float slope;                            // 1 / epsilon, or its opposite
  bool broken_only;                       // solves only the maps whose result is NaN so far
};

// Tiles of rows that a product takes at a time: as many as the warps' column sums have room for.
// For a matrix in device memory, whose addresses take registers, only so many that nothing spills.
template <int kWords, bool kOnChip>
constexpr int kTilesOf = kWords == 4 ? 2 : kWords == 8 || !kOnChip ? 4 : kWords == 14 ? 7 : 5;

// Fills the area with s.
struct Products {
  const Matrices &query, &key;

  template <int kWords, bool kOnChip>
  __device__ __forceinline__ void fill(const Solver<kWords, kOnChip>& s) const {
    constexpr int kTiles = kTilesOf<kWords, kOnChip>;
    const int fitting = s.p.division.partial() / (kTile * kDepth);
    multiply_by_keys<kTiles, kOnChip>(s.own_rows(), s.partial,
                                      fitting < kTiles ? fitting : kTiles, query, key, s.map,
                                      s.first);
  }
};

__device__ __forceinline__ float softplus(float x) {
  return (x > 0 ? x : 0) + log1pf(expf(-fabsf(x)));
}
__device__ __forceinline__ float sigmoid(float x) {
  const float decay = expf(-fabsf(x));
  return (x > 0 ? 1 : decay) / (1 + decay);
}

// w before the exponent of its row's largest is factored out, from K_ij times 2^a_i, v_j 2^-b_j and
// the exponent of E_ij.
__device__ MGHF_NOINLINE Power wide_weight(Power own, Power column, float distance) {
  const float x = distance > -kLargestExponent ? distance : -kLargestExponent;
  const float exponent = round_to_integer(x);
  return {own.exponent + column.exponent + exponent,
          own.power * column.power * power_of_two_within_half(x - exponent)};
}

// The weights w of the block's rows, computed when the area has s again.
template <class S>
struct Weights {
  const S& s;
  const Terms& terms;
  const float *v, *b;  // of the last iterate and of K's last base

  // Numbers of each row: max_j s_ij, the exponent that is factored out of its weights, whether the
  // factors are within float32's range; then, for the gradient, r_i and r_i / sum_j w_ij.
  __device__ __forceinline__ float& highest(int r) const { return s.of_rows[r]; }
  __device__ __forceinline__ float& top(int r) const { return s.of_rows[s.rows + r]; }
  __device__ __forceinline__ float& narrow(int r) const { return s.of_rows[2 * s.rows + r]; }
  __device__ __forceinline__ float& share(int r) const { return s.of_rows[3 * s.rows + r]; }
  __device__ __forceinline__ float& scaled(int r) const { return s.of_rows[4 * s.rows + r]; }

  __device__ __forceinline__ float narrow_weight(const Power& own, float distance, int j,
                                                 float top) const {
    const float x = distance > -125 ? distance : -125;
    return own.power * scale(own.exponent - top) * v[j] * exp2f(x);
  }
  __device__ __forceinline__ Power wide(const Power& own, float distance, int j) const {
    return wide_weight(own, S::split(v[j], b[j]), distance);
  }
  __device__ __forceinline__ Power power(float similarity) const {
    return power_of_two(score_of(similarity, s.p.cost, s.p.cap), s.p.factor);
  }
  __device__ __forceinline__ float weight(const Power& own, float similarity, int r, int j) const {
    const float distance = (similarity - highest(r)) * terms.log2_slope;
    if (narrow(r) > 0) return narrow_weight(own, distance, j, top(r));
    const Power x = wide(own, distance, j);
    return x.power * scale(x.exponent - top(r));
  }

  // Returns x_i of row r from its u and a, and stores the row's numbers except the last two; `sum`
  // becomes sum_j w_ij.
  __device__ __forceinline__ float excess(int r, float u, float a, bool even, float& sum) const {
    const int i = s.first + r;
    float high = -INFINITY, low = INFINITY;
    s.for_columns(r, [&](int j, float x) {
      high = j == i ? high : most_of(high, x);
      low = j == i ? low : least_of(low, x);
    });
    high = across_lanes(high, Most{});
    low = across_lanes(low, [](float x, float y) { return least_of(x, y); });
    const float range =
        score_of(high, s.p.cost, s.p.cap) - score_of(low, s.p.cost, s.p.cap);
    const bool is_narrow = even && fabsf(range * s.p.factor.value) <= 40;
    const auto distance = [&](float x) { return (x - high) * terms.log2_slope; };
    float most = a;
    sum = 0;
    if (is_narrow) {
      s.for_columns(r, [&](int j, float x) {
        const float w = narrow_weight(power(x), distance(x), j, a);
        sum += j == i ? 0 : w;
      });
    } else {
      most = 4 * kNoExponent;
      MGHF_UNROLL(1)
      for (int j = s.lane; j < s.n; j += kWarp) {
        const float x = s.at(r, j);
        if (j != i) most = most_of(most, wide(power(x), distance(x), j).exponent);
      }
      most = across_lanes(most, Most{});
      MGHF_UNROLL(1)
      for (int j = s.lane; j < s.n; j += kWarp) {
        const float x = s.at(r, j);
        const Power w = wide(power(x), distance(x), j);
        sum += j == i ? 0 : w.power * scale(w.exponent - most);
      }
    }
    sum = across_lanes(sum, Add{});
    if (s.lane == 0) {
      highest(r) = high;
      top(r) = most;
      narrow(r) = is_narrow ? 1 : 0;
    }
    const float log_sum = logf(u * sum) + (most - a) * kLn2;
    return (high - s.at(r, i)) * terms.inverse_temperature + (log_sum + terms.log_weight);
  }
};

// ds of the block's rows, in place of s in the area.
template <class S>
__device__ __forceinline__ void differentiate(const S& s, const Weights<S>& weights,
                                              const typename S::Solution& solution, bool exact) {
  constexpr int kRows = kGroup, kWords = S::kWords % 7 == 0 ? 7 : 4;  // columns of a lane at a time
  const Terms& terms = weights.terms;
  const History h = s.history();
  const int first = exact ? h.first() : 1, last = exact ? h.last() : 0, made = solution.made;
  const float *const a = h.a(solution.base), *const b = h.b(solution.base);
  MGHF_UNROLL(1)
  for (int r = s.warp * kRows; r < s.rows; r += s.warps * kRows) {
    int rows[kRows];  // of the matrix; its last in place of those outside
    MGHF_UNROLL_ALL
    for (int g = 0; g < kRows; ++g) rows[g] = s.first + r + g < s.n ? s.first + r + g : s.n - 1;
    MGHF_UNROLL(1)
    for (int left = s.lane; left < s.pitch; left += kWords * kWarp) {
      float correction[kRows][kWords] = {};
      if (exact && solution.base == 0) {
        MGHF_UNROLL(1)
        for (int term = first; term <= last; ++term) {
          const float *const u = h.u(term < made ? term : made);
          const float *const v = h.v(term - 1 < made ? term - 1 : made);
          float new_u[kRows], by_row[kRows];
          MGHF_UNROLL_ALL
          for (int g = 0; g < kRows; ++g) {
            new_u[g] = u[rows[g]];
            by_row[g] = h.rows(term)[rows[g]];
          }
          MGHF_UNROLL_ALL
          for (int k = 0; k < kWords; ++k) {
            const int j = left + k * kWarp < s.n ? left + k * kWarp : s.n - 1;
            const float by_column = h.columns(term)[j], old_v = v[j];
            MGHF_UNROLL_ALL
            for (int g = 0; g < kRows; ++g) {
              correction[g][k] += new_u[g] * by_column + by_row[g] * old_v;
            }
          }
        }
      }
      float loaded[kRows][kWords];
      if constexpr (!S::kShared) {
        MGHF_UNROLL_ALL
        for (int g = 0; g < kRows; ++g) load_columns(loaded[g], &s.at(r + g, left));
      }
      MGHF_UNROLL_ALL
      for (int k = 0; k < kWords; ++k) {
        const int j = left + k * kWarp;
        MGHF_UNROLL_ALL
        for (int g = 0; g < kRows; ++g) {
          const int i = s.first + r + g;
          float& place = s.at(r + g, j);
          const float entry = S::kShared ? place : loaded[g][k];
          float d = 0;
          if (i < s.n && j == i) d = -weights.share(r + g) * terms.inverse_temperature;
          if (i < s.n && j < s.n && j != i) {
            const Power own = weights.power(entry);
            const float w = weights.weight(own, entry, r + g, j) * weights.scaled(r + g);
            d = w * terms.inverse_temperature;
            if (exact) {
              const float through =
                  solution.base > 0 ? wide_correction(h, own, i, j)
                                    : own.power * scale(own.exponent - a[i] - b[j]) *
                                          correction[g][k];
              d += (w - through) * terms.slope * slope_of(entry, s.p.cost, s.p.cap);
            }
          }
          place = d;
        }
      }
    }
  }
}

// Writes a map's losses, or the gradient of its query if `losses` is null.
template <int kWords, bool kOnChip>
__device__ __forceinline__ void contrast_map(Solver<kWords, kOnChip>& s, const Terms& terms,
                                             const Matrices& grad, const Matrices& query,
                                             const Matrices& key, float* losses, void* result) {
  using S = Solver<kWords, kOnChip>;
  const Problem& p = s.p;
  const bool exact = p.history != nullptr;
  const Products source{query, key};
  const auto solution = s.solve(source, losses != nullptr, losses == nullptr);
  if (losses != nullptr) s.finish_leaving(solution);
  const int depth = static_cast<int>(query.columns);
  const int64_t start = s.map * static_cast<int64_t>(s.n);
  if (solution.made < 0) {
    const int64_t end = start + (s.first + s.rows < s.n ? s.first + s.rows : s.n);
    if (losses != nullptr) {
      for (int64_t i = start + s.first + s.thread; i < end; i += s.threads) losses[i] = NAN;
    } else {
      with_element(query.element, [&](auto element) {
        using T = decltype(element);
        T* const out = static_cast<T*>(result);
        for (int64_t i = (start + s.first) * depth + s.thread; i < end * depth; i += s.threads) {
          out[i] = from_float<T>(NAN);
        }
      });
    }
    return;
  }
  if (exact && s.rank == 0 && s.thread == 0) s.history().made() = solution.made;
  if (exact) s.sync_all();  // the history is complete
  source.fill(s);
  // The recursion needs b's place.
  const float* const b = exact ? s.history().b(solution.base) : s.b(solution.base);
  const Weights<S> weights{s, terms, s.v(solution.made), b};
  Statistics statistics;
  s.for_rows([&](int r) {
    if (s.first + r >= s.n) return;
    float sum = 0;
    const float x = weights.excess(r, s.u(solution.made)[r], s.a(solution.base)[r], solution.even,
                                   sum);
    if (s.lane != 0) return;
    if (losses != nullptr) {
      losses[start + s.first + r] = softplus(x);
      return;
    }
    float share = 0;
    with_element(grad.element, [&](auto element) {
      share = grad.matrix<decltype(element)>(s.map)(s.first + r, 0) * sigmoid(x);
    });
    weights.share(r) = share;
    weights.scaled(r) = share / sum;
  });
  if (losses != nullptr) return;
  __syncwarp();
  if (exact) {
    s.for_rows([&](int r) {
      if (s.first + r < s.n) statistics.high = most_of(statistics.high, weights.highest(r));
    });
    s.sum_gradient(statistics, [&](int r, int j, float x) {
      return j == s.first + r ? 0
                              : weights.weight(weights.power(x), x, r, j) * weights.scaled(r);
    });
    s.build(s.history().a(solution.base) + s.first, b);
    // The sum of |ds| is at least that of |r| / t, from the diagonal alone.
    const float steepest =
        fabsf(terms.slope) *
        (p.cost == TransportCost::exp ? exponential(statistics.high, p.cap) : 1);
    const float part = terms.inverse_temperature / steepest;
    s.recur(source, solution, kNegligible * statistics.total * (part < 1 ? part : 1));
    s.sync_all();
    source.fill(s);
  }
  differentiate(s, weights, solution, exact);
  __syncthreads();
  multiply_area<kTilesOf<kWords, kOnChip>, kOnChip>(s.own_rows(), key, result, s.map, s.first);
}

// One kernel for forward and backward, because most of each is the plan.
template <int kWords, bool kOnChip>
__global__ void __launch_bounds__(kThreads, 1)
    contrast(Problem p, Terms terms, Matrices grad, Matrices query, Matrices key, float* losses,
             void* result) {
  MGHF_DYNAMIC_SHARED(float, shared);
  using S = Solver<kWords, kOnChip>;
  // Whether this kernel has to solve a map. Its result changes only after the cluster has met.
  const auto wanted = [&](int map) {
    const int64_t first = static_cast<int64_t>(map) * p.n;
    const float x = losses != nullptr
                        ? losses[first]
                        : read_element(query.element, result, first * query.columns);
    return x != x;
  };
  if (terms.broken_only) {
    // Each thread looks at maps of its own, since loads one after the other take as long as solving
    // a map. A cluster's blocks look at the same ones, so that all return or none.
    const int clusters = static_cast<int>(gridDim.x) / S::blocks_of(p);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    float any = 0;
    MGHF_UNROLL(1)
    for (int64_t map = static_cast<int>(blockIdx.x) / S::blocks_of(p) + int64_t{thread} * clusters;
         map < query.batch; map += int64_t{threads} * clusters) {
      if (wanted(static_cast<int>(map))) any = 1;
    }
    any = across_lanes(any, Most{});
    if (thread % kWarp == 0) shared[thread / kWarp] = any;
    __syncthreads();
    any = 0;
    MGHF_UNROLL(1)
    for (int warp = 0; warp < threads / kWarp; ++warp) any = most_of(any, shared[warp]);
    if (any == 0) return;
    __syncthreads();  // before the first map takes this memory
  }
  for_maps<kWords, kOnChip>(p, shared, query.batch, [&](S& s) {
    if (terms.broken_only && !wanted(s.map)) return;
    contrast_map(s, terms, grad, query, key, losses, result);
  });
}

// N = 1: no negatives, no loss; NaN stays NaN.
__global__ void __launch_bounds__(kThreads)
    single_losses(Matrices query, Matrices key, float* result, KeptIterates kept) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= query.batch) return;
  for (int64_t i = 0; i < kept.numbers(1); ++i) kept.of_map(b, 1).rows[i] = 0;
  with_element(query.element, [&](auto element) {
    const auto q = query.matrix<decltype(element)>(b), k = key.matrix<decltype(element)>(b);
    float product = 0;
    for (int64_t d = 0; d < query.columns; ++d) product += q(0, d) * k(0, d);
    result[b] = product * 0;
  });
}

__global__ void __launch_bounds__(kThreads)
    single_gradients(Matrices grad, Matrices query, void* result) {
  const int64_t x = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (x >= query.batch * query.columns) return;
  const int64_t b = x / query.columns;
  float upstream = 0;
  with_element(grad.element, [&](auto element) {
    upstream = grad.matrix<decltype(element)>(b)(0, 0);
  });
  with_element(query.element, [&](auto element) {
    using T = decltype(element);
    const float zero = query.matrix<T>(b)(0, x % query.columns) * 0 * upstream;
    static_cast<T*>(result)[x] = from_float<T>(zero);
  });
}

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

// Whether the plan has a gradient. With two patches each can only be moved to the other.
bool differentiates_plan(const MonceOptions& options, int64_t n) {
  return options.differentiate_plan && n > 2;
}

const char* divide_maps(int64_t n, int64_t batch, Division& division) {
  const auto kernel = contrast<kStreamedWords, false>;
  return divide(n, batch, reinterpret_cast<const void*>(kernel), division);
}

Terms terms_of(const MonceOptions& options, int64_t n, bool broken_only) {
  const double sign = options.transport.cost == TransportCost::easy ? -1 : 1;
  return {static_cast<float>(1 / options.temperature),
          static_cast<float>(1.4426950408889634 / options.temperature),
          static_cast<float>(log(options.negative_weight * static_cast<double>(n - 1))),
          static_cast<float>(sign / options.transport.epsilon),
          broken_only};
}

// The newer kernels: which of them take these maps, if any.
enum class Newer { none, warp, chip, cluster };

Newer newer_kernels(int64_t n, int64_t depth, const MonceOptions& options) {
  Gpu gpu;
  if (!newest(Variant::monce) || current_gpu(gpu) != nullptr) return Newer::none;
  if (fits_warp(n, depth, options, gpu.shared_bytes)) return Newer::warp;
  if (fits_cluster(n, depth, options)) return Newer::cluster;
  return fits_chip(n, depth, options, gpu.shared_bytes) ? Newer::chip : Newer::none;
}

// The division for the maps that the newer kernels left as NaN, which are few or none: no more
// clusters than their workspace has memory for, if it is enough for one. `bytes`: of the workspace.
const char* divide_broken(Newer newer, int64_t n, int64_t batch, const MonceOptions& options,
                          bool backward, Division& division, int64_t& bytes) {
  constexpr int64_t kMostClusters = 32;
  const char* error = divide_maps(n, batch, division);
  if (error == nullptr && newer == Newer::cluster) {
    error = cluster_workspace_bytes(batch, n, options, backward, bytes);
  } else {
    const auto workspace_bytes = newer == Newer::warp ? warp_workspace_bytes : chip_workspace_bytes;
    bytes = workspace_bytes(batch, n, options, backward);
  }
  if (error != nullptr) return error;
  const bool exact = backward && differentiates_plan(options, n);
  const auto needed = [&] {
    return solver_bytes(n, options.transport.iterations, exact ? division.clusters : 0, division);
  };
  if (division.clusters > kMostClusters) division.clusters = kMostClusters;
  while (division.clusters > 1 && needed() > bytes) --division.clusters;
  if (needed() > bytes) bytes = needed();
  return nullptr;
}

// Launches the kernel that fits the division: forward if there are losses.
const char* launch_contrast(const Division& division, const MonceOptions& options,
                            bool broken_only, const KeptIterates& kept, const Matrices& grad,
                            const Matrices& query, const Matrices& key, float* losses,
                            void* result, void* workspace, Stream stream) {
  const int64_t n = query.rows;
  const bool exact = losses == nullptr && differentiates_plan(options, n);
  const Problem p = problem_of(n, options.transport, division, true, exact ? division.clusters : 0,
                               workspace, kept);
  return with_solver(division, [&]<int kWords, bool kOnChip>(Solver<kWords, kOnChip>*) {
    return launch(contrast<kWords, kOnChip>, division.grid(), stream, p,
                  terms_of(options, n, broken_only), grad, query, key, losses, result);
  });
}

}  // namespace

const char* monce_workspace_bytes(int64_t batch, int64_t size, int64_t depth,
                                  const MonceOptions& options, bool backward, int64_t& bytes) {
  Division division;
  const Newer newer = newer_kernels(size, depth, options);
  if (newer != Newer::none) {
    return divide_broken(newer, size, batch, options, backward, division, bytes);
  }
  const char* const error = divide_maps(size, batch, division);
  if (error == nullptr) {
    const bool exact = backward && differentiates_plan(options, size);
    bytes = solver_bytes(size, options.transport.iterations, exact ? division.clusters : 0,
                         division);
  }
  return error;
}

int64_t monce_backward_maps(int64_t batch, int64_t size, int64_t depth,
                            const MonceOptions& options) {
  constexpr int64_t kMostBytes = int64_t{48} << 20;
  if (newer_kernels(size, depth, options) != Newer::none) return batch;
  Division division;
  int64_t bytes = 0;
  const bool all = divide_maps(size, batch, division) != nullptr || !division.on_chip ||
                     monce_workspace_bytes(batch, size, depth, options, true, bytes) != nullptr ||
                     bytes <= kMostBytes;
  return all ? batch : (batch + 1) / 2;
}

const char* monce(const Matrices& query, const Matrices& key, const MonceOptions& options,
                  float* result, int* state, int slots, void* workspace, Stream stream) {
  const int64_t n = query.rows, batch = query.batch;
  const KeptIterates kept{state, slots};
  if (n == 1) {
    return launch(single_losses, {blocks_for(batch), kThreads}, stream, query, key, result,
                  kept);
  }
  Division division;
  const Newer newer = newer_kernels(n, query.columns, options);
  const bool follows = newer != Newer::none;
  int64_t bytes = 0;
  const char* error = follows ? divide_broken(newer, n, batch, options, false, division, bytes)
                              : divide_maps(n, batch, division);
  if (error == nullptr && follows) {
    const auto launch_newer = newer == Newer::warp   ? monce_by_warps
                              : newer == Newer::chip ? monce_on_chip
                                                     : monce_by_clusters;
    error = launch_newer(query, key, options, result, state, slots, workspace, stream);
  }
  if (error != nullptr) return error;
  return launch_contrast(division, options, follows, kept, {}, query, key, result, nullptr,
                         workspace, stream);
}

const char* monce_backward(const Matrices& grad, const Matrices& query, const Matrices& key,
                           const int* state, int slots, const MonceOptions& options,
                           void* grad_query, void* workspace, Stream stream) {
  const int64_t n = query.rows, batch = query.batch;
  if (n == 1) {
    return launch(single_gradients, {blocks_for(batch * query.columns), kThreads}, stream, grad,
                  query, grad_query);
  }
  Division division;
  const Newer newer = newer_kernels(n, query.columns, options);
  const bool follows = newer != Newer::none;
  int64_t bytes = 0;
  const char* error = follows ? divide_broken(newer, n, batch, options, true, division, bytes)
                              : divide_maps(n, batch, division);
  if (error == nullptr && follows) {
    const auto launch_newer = newer == Newer::warp   ? monce_backward_by_warps
                              : newer == Newer::chip ? monce_backward_on_chip
                                                     : monce_backward_by_clusters;
    error = launch_newer(grad, query, key, state, slots, options, grad_query, workspace, stream);
  }
  if (error != nullptr) return error;
  const KeptIterates kept{const_cast<int*>(state), slots};  // is only read
  return launch_contrast(division, options, follows, kept, grad, query, key, nullptr, grad_query,
                         workspace, stream);
}

}  // namespace mghf::cuda
