// The kernels of `monce` for maps that a cluster of blocks solves on chip, and their launches. See
// monce.cu for the mathematics and monce_cluster_block.h for the method. Maps of at most 32
// patches, which would leave most of a tile empty, are left to monce_chip.h.
#include "monce_cluster.h"

#include "monce_cluster_passes.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

// Writes the losses and the state or, with kBackward, the gradient of the queries. The grid's
// clusters take maps in turn.
template <bool kBackward>
__global__ void __launch_bounds__(kClusterThreads, 1)
    contrast_by_clusters(ClusterProblem p, Matrices grad, Matrices query, Matrices key,
                         float* losses, void* result) {
  if constexpr (kWarpgroupProducts) {
    MGHF_DYNAMIC_SHARED(float, shared);
    if (threadIdx.x == 0) {
      ClusterState& state = *reinterpret_cast<ClusterState*>(shared);
      state.cluster = static_cast<int>(blockIdx.x) / p.division.blocks;
      state.rank = static_cast<int>(block_of_cluster());
    }
    __syncthreads();
    const ClusterMap<kBackward> s(p, shared, static_cast<int>(threadIdx.x));
    const bool repeats = s.cluster() >= p.clusters;
    const int step = repeats ? p.again : p.clusters;
    int map = repeats ? s.cluster() - p.clusters : s.cluster();
    MGHF_UNROLL(1)
    while (true) {
      while (kBackward && p.again > 0 && map < p.maps && repeats != (s.resumable(map) == 0)) {
        map += step;
      }
      if (map >= p.maps) return;
      s.again().begin(query, key, map);
      s.again().run(grad, losses);
      if constexpr (kBackward) {
        s.again().finish_gradient(query, key, result);
      } else {
        s.again().finish(losses);
      }
      map = s.state().map + step;
      sync_cluster();  // others may still read this block's memory
    }
  }
}

// Memory of the clusters that make iterations again, unless a single one's takes more.
constexpr int64_t kAgainBytes = int64_t{10} << 20;

bool goes_through_plan(const MonceOptions& options, int64_t n) {
  return options.differentiate_plan && n > 2;
}

Grid grid_of(const ClusterDivision& division, int64_t clusters) {
  return {clusters * division.blocks, division.threads(), division.shared_bytes(),
          static_cast<unsigned>(division.blocks), kClusterRegisters};
}

const char* count_clusters(const ClusterDivision& division, bool backward, int64_t& clusters) {
  const void* const kernel =
      backward ? reinterpret_cast<const void*>(contrast_by_clusters<true>)
               : reinterpret_cast<const void*>(contrast_by_clusters<false>);
  return running_at_a_time(kernel, grid_of(division, 1), clusters);
}

struct ClusterPlan {
  ClusterProblem problem;
  int64_t clusters;
};

// The workspace is handed out by `pieces`.
ClusterPlan plan_clusters(int64_t n, int64_t batch, int64_t running, const MonceOptions& options,
                          bool backward, KeptIterates kept, Pieces& pieces) {
  constexpr double kLog2E = 1.4426950408889634;
  const double sign = options.transport.cost == TransportCost::easy ? -1 : 1;
  const double plan = sign * kLog2E / options.transport.epsilon;
  const double contrast = kLog2E / options.temperature;
  const int64_t iterations = options.transport.iterations;
  const ClusterDivision division(n);
  const bool exact = backward && goes_through_plan(options, n);
  const int64_t history = exact ? (2 * iterations * n + 3) / 4 * 4 : 0;
  const int64_t kept_terms = iterations < kShortIterations ? iterations + 1 : kShortIterations + 1;
  const int64_t terms = exact ? ClusterTerms::floats(division, kept_terms) : 0;
  const int64_t repeated = exact ? ClusterTerms::floats(division, iterations + 1) + history : 0;
  const int64_t clusters = clusters_for(batch, running), words = division.tiles * kTileWords;
  const int64_t within = exact ? kAgainBytes / (4 * repeated + 16 * words) : 0;
  const int64_t again = !exact ? 0 : within < 1 ? 1 : within < batch ? within : batch;
  uint4* const queries = pieces.take<uint4>((clusters + again) * words);
  float* const of_terms = pieces.take<float>(clusters * terms);
  float* const of_again = pieces.take<float>(again * repeated);
  return {{static_cast<int>(n), static_cast<int>(batch), static_cast<int>(iterations),
           static_cast<int>(clusters), static_cast<int>(again), division,
           kept, Factor(plan), Factor(plan + contrast), Factor(contrast),
           static_cast<float>(1 / options.temperature),
           static_cast<float>(log(options.negative_weight * static_cast<double>(n - 1))),
           exact ? static_cast<float>(sign / options.transport.epsilon) : 0, exact, false, false,
           queries, of_terms, of_again, terms, repeated, history},
          clusters + again};
}

template <bool kBackward>
const char* launch_clusters(const MonceOptions& options, const Matrices& grad,
                            const Matrices& query, const Matrices& key, KeptIterates kept,
                            float* losses, void* result, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  int64_t running = 0;
  const char* const error = count_clusters(ClusterDivision(query.rows), kBackward, running);
  if (error != nullptr) return error;
  ClusterPlan plan =
      plan_clusters(query.rows, query.batch, running, options, kBackward, kept, pieces);
  plan.problem.once = query.once || query.element != Element::float32;
  plan.problem.once_by_keys = query.once;
  return launch(contrast_by_clusters<kBackward>,
                grid_of(plan.problem.division, plan.clusters), stream, plan.problem,
                grad, query, key, losses, result);
}

}  // namespace

bool fits_cluster(int64_t n, int64_t depth, const MonceOptions& options) {
  constexpr double kLeastEpsilon = 0.05;
  if (n <= kWarpRows || n > kMostClusterBlocks * kBlockColumns || depth > kMostDepth ||
      options.transport.epsilon < kLeastEpsilon ||
      options.transport.cost == TransportCost::exp) {
    return false;
  }
  Gpu gpu;
  bool products = false;
  if (current_gpu(gpu) != nullptr || has_warpgroup_products(products) != nullptr) return false;
  const ClusterDivision division(n);
  if (!gpu.clusters || !products ||
      static_cast<int64_t>(division.shared_bytes()) > gpu.shared_bytes) {
    return false;
  }
  int64_t forward = 0, backward = 0;
  return count_clusters(division, false, forward) == nullptr && forward > 0 &&
         count_clusters(division, true, backward) == nullptr && backward > 0;
}

const char* cluster_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options,
                                    bool backward, int64_t& bytes) {
  int64_t running = 0;
  const char* const error = count_clusters(ClusterDivision(n), backward, running);
  if (error != nullptr) return error;
  Pieces pieces;
  plan_clusters(n, batch, running, options, backward, {}, pieces);
  bytes = pieces.bytes();
  return nullptr;
}

const char* monce_by_clusters(const Matrices& query, const Matrices& key,
                              const MonceOptions& options, float* losses, int* state, int slots,
                              void* workspace, Stream stream) {
  return launch_clusters<false>(options, {}, query, key, {state, slots}, losses, nullptr,
                                workspace, stream);
}

const char* monce_backward_by_clusters(const Matrices& grad, const Matrices& query,
                                       const Matrices& key, const int* state, int slots,
                                       const MonceOptions& options, void* grad_query,
                                       void* workspace, Stream stream) {
  const KeptIterates kept{const_cast<int*>(state), slots};  // is only read
  return launch_clusters<true>(options, grad, query, key, kept, nullptr, grad_query, workspace,
                               stream);
}

}  // namespace mghf::cuda
