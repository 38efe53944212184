// The kernels of `monce` for maps that one warp solves, and their launches. See monce.cu for the
// mathematics and monce_warp_block.h for the method. The cost "exp" is left to monce_chip.h.
//
// Predicted, before it was written, on an H200, whose 528 schedulers issue an instruction a cycle
// each. A map of 25 patches and 64 numbers, as 4 x 4 tiles: the products are 192 tensor
// instructions and 600 others, K and the weights 130 each, an iteration 190, a step of the
// recursion 250, the gradient's product 192 and 500. Forward 2,200 instructions: 2048 maps 3.9 a
// scheduler, 5 us, and as long again for a warp's own latencies, 12 us with the launch. Backward
// 3,300: 17 us. A map of 4 patches is one tile: forward 700 instructions, 4096 maps 3 us and a
// warp's 2 us, 8 us with the launch; backward 1,000, 11 us. What was counted is in
// benchmarks/NOTES.md.
#include "monce_warp.h"

#include "monce_warp_passes.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

// Memory of all warps that make iterations again.
constexpr int64_t kAgainBytes = int64_t{10} << 20;

constexpr int kThreadsOfMaps = kWarpsOfBlock * kWarp;
// Blocks of a multiprocessor that registers have to be enough for.
template <int kTiles>
constexpr int kBlocksOfMaps = kTiles == 4 ? 4 : kTiles == 2 ? 6 : 8;

// Writes the losses and the state. Each warp has a map.
template <int kTiles>
__global__ void __launch_bounds__(kThreadsOfMaps, kBlocksOfMaps<kTiles>)
    losses_by_warps(WarpProblem p, Matrices query, Matrices key, float* losses) {
  MGHF_DYNAMIC_SHARED(float, shared);
  const int lane = static_cast<int>(threadIdx.x) & (kWarp - 1);
  const int warp = static_cast<int>(threadIdx.x) >> 5;
  const int map = static_cast<int>(blockIdx.x) * kWarpsOfBlock + warp;
  float* const own = shared + warp * p.shared_of_warp();
  if (map < p.maps) write_losses<kTiles>(p, own, map, lane, query, key, losses);
}

// The first of the maps `first`, `first` + p.again, ... whose iterations have to be made again;
// p.maps if there is none. The lanes look at different ones, as loads one after the other take
// long.
__device__ __forceinline__ int first_to_repeat(const WarpProblem& p, int64_t first, int lane) {
  MGHF_UNROLL(1)
  while (first < p.maps) {
    const int64_t map = first + int64_t{lane} * p.again;
    const bool repeats = map < p.maps && resumable(p, static_cast<int>(map)) == 0;
    const int found = static_cast<int>(
        __reduce_min_sync(kAllLanes, static_cast<unsigned>(repeats ? lane : kWarp)));
    first += int64_t{found} * p.again;
    if (found < kWarp) return static_cast<int>(first);
  }
  return p.maps;
}

// Writes the gradient of the queries. Each warp has a map, unless iterations have to be made again
// for it: the warps that have the memory do that afterwards.
template <int kTiles>
__global__ void __launch_bounds__(kThreadsOfMaps, kBlocksOfMaps<kTiles>)
    gradient_by_warps(WarpProblem p, Matrices grad, Matrices query, Matrices key, void* result) {
  MGHF_DYNAMIC_SHARED(float, shared);
  const int lane = static_cast<int>(threadIdx.x) & (kWarp - 1);
  const int warp_of_block = uniform(static_cast<int>(threadIdx.x) >> 5);
  const int warp = static_cast<int>(blockIdx.x) * kWarpsOfBlock + warp_of_block;
  float* const own = shared + warp_of_block * p.shared_of_warp();
  int map = warp, resumed = warp < p.maps ? uniform(resumable(p, warp)) : 0;
  if (p.again > 0 && resumed == 0) map = warp < p.again ? first_to_repeat(p, warp, lane) : p.maps;
  MGHF_UNROLL(1)
  while (map < p.maps) {
    // What depends on the lane is computed again for each map, because registers are short.
    WarpGradient<kTiles>(p, own, map, opaque(lane)).write(resumed, warp, grad, query, key, result);
    if (warp >= p.again) return;
    // The warp's own map is the first of those that it may have to repeat.
    map = first_to_repeat(p, resumed > 0 ? warp : int64_t{map} + p.again, lane);
    resumed = 0;
  }
}

bool differentiates(const MonceOptions& options, int64_t n) {
  return options.differentiate_plan && n > 2;
}

// Whether four neighbours in a row can be read at a time.
bool reads_fours(const Matrices& m) {
  const auto whole = [](int64_t x) { return x % 4 == 0; };
  const uintptr_t bytes = m.element == Element::float32 ? 16 : 8;
  return m.column_stride == 1 && whole(m.columns) && whole(m.row_stride) &&
         whole(m.batch_stride) && reinterpret_cast<uintptr_t>(m.data) % bytes == 0;
}

void set_layouts(WarpProblem& p, const Matrices& query, const Matrices& key) {
  p.once = query.once;
  p.fours_of_query = reads_fours(query);
  p.fours_of_key = reads_fours(key);
}

// The workspace is handed out by `pieces`.
WarpProblem warp_problem(int64_t n, int64_t batch, const MonceOptions& options, bool backward,
                         KeptIterates kept, Pieces& pieces) {
  constexpr double kLog2E = 1.4426950408889634;
  // In place of a factor 0, for which no entry is hidden.
  constexpr double kNothing = 1e-31;
  const double sign = options.transport.cost == TransportCost::easy ? -1 : 1;
  const double plan = sign * kLog2E / options.transport.epsilon;
  const double contrast = kLog2E / options.temperature;
  const double weight = plan + contrast;
  const bool exact = backward && differentiates(options, n);
  const int64_t repeated = options.transport.iterations * 2 * n;
  int64_t again = 0;
  if (exact) {
    again = kAgainBytes / (repeated * static_cast<int64_t>(sizeof(float)));
    again = again < 1 ? 1 : again < batch ? again : batch;
  }
  WarpProblem p{static_cast<int>(n),
                static_cast<int>(batch),
                static_cast<int>(options.transport.iterations),
                static_cast<int>(again),
                false,
                exact,
                false,
                false,
                false,
                kept,
                Factor(plan),
                Factor(weight == 0 ? kNothing : weight),
                Factor(contrast),
                static_cast<float>(1 / options.temperature),
                static_cast<float>(log(options.negative_weight * static_cast<double>(n - 1))),
                exact ? static_cast<float>(sign / options.transport.epsilon) : 0,
                nullptr};
  p.repeated = pieces.take<float>(again * repeated);
  return p;
}

// Calls f with the number of tiles of 8 patches as a constant.
template <class F>
const char* with_tiles(int64_t n, const F& f) {
  if (n <= 8) return f.template operator()<1>();
  if (n <= 16) return f.template operator()<2>();
  return f.template operator()<kMostTiles>();
}

size_t shared_bytes_of(int n) {
  return static_cast<size_t>(kWarpsOfBlock) * WarpProblem::numbers_of(n) * sizeof(float);
}

Grid grid_of(const WarpProblem& p) {
  return {(int64_t{p.maps} + kWarpsOfBlock - 1) / kWarpsOfBlock, kThreadsOfMaps,
          shared_bytes_of(p.n)};
}

}  // namespace

bool fits_warp(int64_t n, int64_t depth, const MonceOptions& options, int64_t shared_bytes) {
  constexpr double kLeastEpsilon = 0.05;
  return n >= 2 && n <= 8 * kMostTiles && depth <= kMostDepth &&
         options.transport.epsilon >= kLeastEpsilon &&
         options.transport.cost != TransportCost::exp &&
         static_cast<int64_t>(shared_bytes_of(static_cast<int>(n))) <= shared_bytes;
}

int64_t warp_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options,
                             bool backward) {
  Pieces pieces;
  warp_problem(n, batch, options, backward, {}, pieces);
  return pieces.bytes();
}

const char* monce_by_warps(const Matrices& query, const Matrices& key, const MonceOptions& options,
                           float* losses, int* state, int slots, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  WarpProblem p = warp_problem(query.rows, query.batch, options, false, {state, slots}, pieces);
  set_layouts(p, query, key);
  return with_tiles(query.rows, [&]<int kTiles>() {
    return launch(losses_by_warps<kTiles>, grid_of(p), stream, p, query, key, losses);
  });
}

const char* monce_backward_by_warps(const Matrices& grad, const Matrices& query,
                                    const Matrices& key, const int* state, int slots,
                                    const MonceOptions& options, void* grad_query, void* workspace,
                                    Stream stream) {
  Pieces pieces(workspace);
  const KeptIterates kept{const_cast<int*>(state), slots};  // is only read
  WarpProblem p = warp_problem(query.rows, query.batch, options, true, kept, pieces);
  set_layouts(p, query, key);
  p.fours_of_result = query.element == Element::float32 && query.columns % 4 == 0 &&
                      reinterpret_cast<uintptr_t>(grad_query) % 16 == 0;
  return with_tiles(query.rows, [&]<int kTiles>() {
    return launch(gradient_by_warps<kTiles>, grid_of(p), stream, p, grad, query, key,
                  grad_query);
  });
}

}  // namespace mghf::cuda
