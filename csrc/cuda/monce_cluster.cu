// The kernels of `monce` for maps that a cluster of blocks solves on chip, and their launches. See
// monce.cu for the mathematics and monce_cluster_block.h for the method. Maps of at most 32
// patches, which would leave most of a tile empty, are left to monce_chip.h.
#include "monce_cluster.h"

#include "monce_cluster_passes.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

// Writes the losses and the state or, with kBackward, the gradient of the queries. The grid's
// clusters take maps in turn; of a backward first those whose iterations are in the state, then
// those whose iterations are made again, by the clusters that have the memory.
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
    bool repeats = false;
    int map = s.cluster();
    MGHF_UNROLL(1)
    while (true) {
      const int step = repeats ? p.again : p.clusters;
      if (kBackward && p.again > 0) {
        while (!repeats && map < p.maps && s.resumable(map) == 0) map += step;
        while (repeats && map < p.maps && s.resumable(map) > 0) map += step;
      }
      if (map >= p.maps) {
        if (repeats || s.cluster() >= p.again) return;
        repeats = true;
        map = s.cluster();
        continue;
      }
      s.again().begin(query, key, map);
      s.again().run(grad, key, losses, result);
      if constexpr (kBackward) {
        s.again().finish_gradient(query, result);
      } else {
        s.again().finish(losses);
      }
      map = s.state().map + step;
      sync_cluster();  // others may still read this block's memory
    }
  }
}

// Memory of the clusters that make iterations again, unless a single one's takes more: little where
// maps are small, as a step's peak is in this gradient then.
constexpr int64_t kAgainBytes = int64_t{10} << 20, kAgainBytesOfSeveral = int64_t{80} << 20;

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

// The workspace is handed out by `pieces`.
ClusterProblem cluster_problem(int64_t n, int64_t batch, int64_t running,
                               const MonceOptions& options, bool backward, KeptIterates kept,
                               Pieces& pieces) {
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
  const int64_t most = division.blocks > 1 ? kAgainBytesOfSeveral : kAgainBytes;
  const int64_t within = exact ? most / (4 * repeated) : 0;
  const int64_t again = !exact ? 0 : within < 1 ? 1 : within < clusters ? within : clusters;
  uint4* const queries = pieces.take<uint4>(clusters * words);
  float* const of_terms = pieces.take<float>(clusters * terms);
  float* const of_again = pieces.take<float>(again * repeated);
  const double slope = exact ? sign / options.transport.epsilon : 0;
  // The sum of |ds| is at least that of |r| / t, from the diagonal alone.
  const double of_shares = exact ? fmin(1 / (options.temperature * fabs(slope)), 1.0) : 0;
  return {static_cast<int>(n),
          static_cast<int>(batch),
          static_cast<int>(iterations),
          static_cast<int>(clusters),
          static_cast<int>(again),
          division,
          kept,
          Factor(plan),
          Factor(plan + contrast),
          Factor(contrast),
          static_cast<float>(1 / options.temperature),
          static_cast<float>(log(options.negative_weight * static_cast<double>(n - 1))),
          static_cast<float>(slope),
          static_cast<float>(kNegligiblePart * of_shares),
          exact,
          false,
          false,
          queries,
          of_terms,
          of_again,
          terms,
          repeated,
          history};
}

template <bool kBackward>
const char* launch_clusters(const MonceOptions& options, const Matrices& grad,
                            const Matrices& query, const Matrices& key, KeptIterates kept,
                            float* losses, void* result, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  int64_t running = 0;
  const char* const error = count_clusters(ClusterDivision(query.rows), kBackward, running);
  if (error != nullptr) return error;
  ClusterProblem p =
      cluster_problem(query.rows, query.batch, running, options, kBackward, kept, pieces);
  p.once = query.once || query.element != Element::float32;
  p.once_by_keys = query.once;
  return launch(contrast_by_clusters<kBackward>, grid_of(p.division, p.clusters), stream, p, grad,
                query, key, losses, result);
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
  cluster_problem(n, batch, running, options, backward, {}, pieces);
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
