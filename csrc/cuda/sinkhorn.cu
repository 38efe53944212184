// Sinkhorn's plans and their gradients. See sinkhorn_solver.h for the method.
//
//     plan_ij = u_i K_ij v_j
//     dlog plan_ij = W_ij = dplan_ij plan_ij
//     dlog K_ij = W_ij - K_ij sum over the terms t of u^t_i (v^t dg^t)_j + (u^t df^t)_i v^(t-1)_j
//     dsimilarity_ij = dlog K_ij dscore / dsimilarity / epsilon
//
// Forward: one launch. Backward: two, the first for the iterations and the recursion, the second
// for the entries of the gradient, which are independent of each other.
//
// Predicted floor for B = 128, N = 441, float32 on an H200: 99.6 MB read and written, 46 us at 4.3
// TB/s. The 33 clusters of 4 blocks (226 KB of shared memory each) that run at a time solve a
// matrix each, in four rounds; K is built in 7 us. An iteration takes a block's 196 KB and five
// shuffles a row through the shared memory's pipe, 2100 cycles, and its exchange (a barrier of the
// cluster, two of the block, 4 x 441 sums through distributed shared memory) about 1300: 1.8 us.
// All 50 iterations: 4 x (7 + 50 x 1.8) = 390 us, so 0.44 ms in all, and half of that for B = 64.
// Backward: about 8 more sweeps, the gradient read twice, the entries in 70 us: about 0.65 ms.
#include "sinkhorn.h"

#include "sinkhorn_gradient.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = kMostWarps * kWarp;
// Relative part of the sum of |W| that the recursion may leave out.
constexpr float kNegligible = 1e-7f;

// A warp takes rows. float32 is copied into shared memory without registers, so all copies are in
// flight at once; on their way to the device's memory numbers are loaded some at a time.
template <bool kOnChip, class T>
__device__ __forceinline__ void fill_rows(const Area& area, const Matrix<T>& matrix, int first,
                                          int n) {
  for_rows_of_warp(area.rows, [&](int r) {
    const int64_t i = first + r;
    if (i >= n) return;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    if constexpr (kOnChip) {
      MGHF_UNROLL(8)
      for (int j = lane; j < n; j += kWarp) {
        if constexpr (std::is_same_v<T, float>) {
          copy_async<4>(&area.at(r, j),
                        matrix.data + i * matrix.row_stride + j * matrix.column_stride);
        } else {
          area.at(r, j) = matrix(i, j);
        }
      }
    } else {
      MGHF_UNROLL(1)
      for (int left = lane; left < n; left += kLoaded * kWarp) {
        float x[kLoaded];
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) {
          x[k] = left + k * kWarp < n ? matrix(i, left + k * kWarp) : 0;
        }
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) area.at(r, left + k * kWarp) = x[k];
      }
    }
  });
  end_copies();
  wait_for_copies<0>();
}

// The same for contiguous columns: 8 elements of one at a time.
template <class T>
__device__ __forceinline__ void fill_columns(const Area& area, const Matrix<T>& matrix, int first,
                                             int n) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int end = area.rows < n - first ? area.rows : n - first;
  for (int j = thread / 8; j < n; j += threads / 8) {
    MGHF_UNROLL(4)
    for (int r = thread % 8; r < end; r += 8) area.at(r, j) = matrix(first + r, j);
  }
}

// Not inlined, because kernels call it in several places.
template <bool kOnChip>
__device__ MGHF_NOINLINE void fill_area(Area area, Matrices similarity, int map, int first, int n) {
  with_element(similarity.element, [&](auto element) {
    const auto matrix = similarity.matrix<decltype(element)>(map);
    if (similarity.by_rows()) {
      fill_rows<kOnChip>(area, matrix, first, n);
    } else {
      fill_columns(area, matrix, first, n);
    }
  });
}

// Fills the area with given similarities.
struct Given {
  const Matrices& similarity;

  template <int kWords, bool kOnChip>
  __device__ __forceinline__ void fill(const Solver<kWords, kOnChip>& s) const {
    fill_area<kOnChip>(s.own_rows(), similarity, s.map, s.first, s.n);
    __syncthreads();
  }
};

// Writes a matrix's plan, or the terms of its gradient to the history if `plan` is null.
template <int kWords, bool kOnChip>
__device__ __forceinline__ void transport_map(Solver<kWords, kOnChip>& s,
                                              const Matrices& similarity, const Matrices& grad,
                                              void* plan) {
  const Given source{similarity};
  const auto solution = s.solve(source, false);
  const float *const u = s.u(solution.made), *const v = s.v(solution.made);
  if (plan != nullptr) {
    with_element(similarity.element, [&](auto element) {
      using T = decltype(element);
      T* const out = static_cast<T*>(plan) + s.map * static_cast<int64_t>(s.n) * s.n;
      s.for_rows([&](int r) {
        const int64_t i = s.first + r;
        if (i >= s.n) return;
        s.template for_columns<8>(r, [&](int j, float x) {
          const float value = solution.made < 0 ? NAN : u[r] * x * v[j];
          out[i * s.n + j] = from_float<T>(value);
        });
      });
    });
    return;
  }
  if (s.rank == 0 && s.thread == 0) s.history().made() = solution.made;
  if (solution.made < 0) return;
  Statistics statistics;
  with_element(grad.element, [&](auto element) {
    const auto upstream = grad.matrix<decltype(element)>(s.map);
    s.sum_gradient(statistics, [&](int r, int j, float x) {
      return upstream(s.first + r, j) * (u[r] * x * v[j]);
    });
  });
  s.recur(source, solution, kNegligible * statistics.total);
}

// One kernel for forward and backward, because most of each are the iterations.
template <int kWords, bool kOnChip>
__global__ void __launch_bounds__(kThreads, 1)
    transport(Problem p, Matrices similarity, Matrices grad, void* plan) {
  MGHF_DYNAMIC_SHARED(float, shared);
  for_maps<kWords, kOnChip>(p, shared, similarity.batch, [&](Solver<kWords, kOnChip>& s) {
    transport_map(s, similarity, grad, plan);
  });
}

// ---- the entries of the gradient ----

constexpr int kRows = 4, kWords = 4;  // of a warp: rows, and columns of a lane
constexpr int kTileRows = kMostWarps * kRows, kTileColumns = kWords * kWarp;

__global__ void __launch_bounds__(kThreads, 1)
    gradients(Problem p, Matrices similarity, Matrices grad, void* result, float slope) {
  const int n = p.n, tiles_i = (n + kTileRows - 1) / kTileRows;
  const int tiles_j = (n + kTileColumns - 1) / kTileColumns;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int block = static_cast<int>(blockIdx.x);
  const int64_t map = block / (tiles_i * tiles_j);
  const int top = block / tiles_j % tiles_i * kTileRows + warp * kRows;
  const int left = block % tiles_j * kTileColumns + lane;
  const History h(p.history + map * p.history_floats, n, p.iterations);
  const int made = h.made();
  // Indices outside are replaced by others inside, whose elements are not changed.
  int rows[kRows], columns[kWords];
  MGHF_UNROLL_ALL
  for (int g = 0; g < kRows; ++g) rows[g] = top + g < n ? top + g : n - 1;
  MGHF_UNROLL_ALL
  for (int k = 0; k < kWords; ++k) columns[k] = left + k * kWarp < n ? left + k * kWarp : n - 1;

  float value[kRows][kWords], upstream[kRows][kWords];
  const auto read = [&](const Matrices& from, float (&to)[kRows][kWords]) {
    with_element(from.element, [&](auto element) {
      const auto matrix = from.matrix<decltype(element)>(map);
      MGHF_UNROLL_ALL
      for (int g = 0; g < kRows; ++g) {
        MGHF_UNROLL_ALL
        for (int k = 0; k < kWords; ++k) to[g][k] = matrix(rows[g], columns[k]);
      }
    });
  };
  read(similarity, value);
  read(grad, upstream);
  float correction[kRows][kWords] = {};
  const int base = made > 0 ? h.base(made) : 0;
  if (made > 0 && base == 0) {
    for (int term = h.first(), last = h.last(); term <= last; ++term) {
      const float *const u = h.u(term < made ? term : made);
      const float *const v = h.v(term - 1 < made ? term - 1 : made);
      const float *const by_rows = h.rows(term), *const by_columns = h.columns(term);
      float c[kWords], old_v[kWords];
      MGHF_UNROLL_ALL
      for (int k = 0; k < kWords; ++k) {
        c[k] = by_columns[columns[k]];
        old_v[k] = v[columns[k]];
      }
      MGHF_UNROLL_ALL
      for (int g = 0; g < kRows; ++g) {
        const float new_u = u[rows[g]], r = by_rows[rows[g]];
        MGHF_UNROLL_ALL
        for (int k = 0; k < kWords; ++k) correction[g][k] += new_u * c[k] + r * old_v[k];
      }
    }
  }
  const float *const a = h.a(base), *const b = h.b(base);
  const float *const u = h.u(made > 0 ? made : 0), *const v = h.v(made > 0 ? made : 0);
  MGHF_UNROLL_ALL
  for (int g = 0; g < kRows; ++g) {
    const int i = rows[g];
    MGHF_UNROLL_ALL
    for (int k = 0; k < kWords; ++k) {
      const int j = columns[k];
      const float score = score_of(value[g][k], p.cost, p.cap);
      const Power power = power_of_two(score, p.factor);
      const float entry = power.power * scale(power.exponent - a[i] - b[j]);
      float through = entry * correction[g][k];
      if (base > 0) through = wide_correction(h, power, i, j);
      const float d = upstream[g][k] * (u[i] * entry * v[j]) - through;
      const float by_score =
          p.cost != TransportCost::exp ? 1 : value[g][k] > p.cap ? 0 : score;
      value[g][k] = made < 0 ? NAN : i == j ? 0 : d * slope * by_score;
    }
  }
  with_element(similarity.element, [&](auto element) {
    using T = decltype(element);
    T* const out = static_cast<T*>(result) + map * static_cast<int64_t>(n) * n;
    MGHF_UNROLL_ALL
    for (int g = 0; g < kRows; ++g) {
      MGHF_UNROLL_ALL
      for (int k = 0; k < kWords; ++k) {
        if (top + g < n && left + k * kWarp < n) {
          out[static_cast<int64_t>(top + g) * n + left + k * kWarp] = from_float<T>(value[g][k]);
        }
      }
    }
  });
}

__global__ void __launch_bounds__(kThreads) singles(Matrices x, void* result, Element to) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= x.batch) return;
  float zero = 0;
  with_element(x.element, [&](auto element) {
    zero = x.matrix<decltype(element)>(b)(0, 0) * 0;
  });
  with_element(to, [&](auto element) {
    using T = decltype(element);
    static_cast<T*>(result)[b] = from_float<T>(zero);
  });
}

const char* divide_matrices(int64_t n, int64_t batch, Division& division) {
  const auto kernel = transport<kStreamedWords, false>;
  return divide(n, batch, reinterpret_cast<const void*>(kernel), division);
}

// N = 1: nothing to move mass to, and NaN stays NaN.
const char* solve_single(const Matrices& x, Element to, void* result, Stream stream) {
  return launch(singles, {(x.batch + kThreads - 1) / kThreads, kThreads}, stream, x, result, to);
}

}  // namespace

const char* sinkhorn_workspace_bytes(int64_t batch, int64_t size, int64_t iterations,
                                     bool backward, int64_t& bytes) {
  Division division;
  const char* const error = divide_matrices(size, batch, division);
  if (error == nullptr) bytes = solver_bytes(size, iterations, backward ? batch : 0, division);
  return error;
}

const char* sinkhorn(const Matrices& similarity, const TransportOptions& options, void* plan,
                     void* workspace, Stream stream) {
  if (similarity.rows == 1) return solve_single(similarity, similarity.element, plan, stream);
  Division division;
  const char* const error = divide_matrices(similarity.rows, similarity.batch, division);
  if (error != nullptr) return error;
  const Problem p = problem_of(similarity.rows, options, division, false, 0, workspace);
  return with_solver(division, [&]<int kWords, bool kOnChip>(Solver<kWords, kOnChip>*) {
    return launch(transport<kWords, kOnChip>, division.grid(), stream, p,
                  similarity, Matrices{}, plan);
  });
}

const char* sinkhorn_backward(const Matrices& grad, const Matrices& similarity,
                              const TransportOptions& options, void* grad_similarity,
                              void* workspace, Stream stream) {
  const int64_t n = similarity.rows, batch = similarity.batch;
  if (n == 1) return solve_single(grad, similarity.element, grad_similarity, stream);
  Division division;
  const char* error = divide_matrices(n, batch, division);
  if (error != nullptr) return error;
  const Problem p = problem_of(n, options, division, false, batch, workspace);
  error = with_solver(division, [&]<int kWords, bool kOnChip>(Solver<kWords, kOnChip>*) {
    return launch(transport<kWords, kOnChip>, division.grid(), stream, p, similarity, grad,
                  nullptr);
  });
  if (error != nullptr) return error;
  const int64_t tiles =
      ((n + kTileRows - 1) / kTileRows) * ((n + kTileColumns - 1) / kTileColumns);
  const double slope = (options.cost == TransportCost::easy ? -1 : 1) / options.epsilon;
  return launch(gradients, {batch * tiles, kThreads}, stream, p, similarity, grad,
                grad_similarity, static_cast<float>(slope));
}

}  // namespace mghf::cuda
