// The kernels of `monce` for maps that one block solves on chip, and their launches. See monce.cu
// for the mathematics and monce_chip_block.h for the method.
//
// Predicted for B = 128, N = 441, D = 64 on an H200, one round of blocks: a pass is 18,800 tensor
// instructions of 16 x 8 x 16 a map, 17 us at 1,300 multiply-adds a cycle, while shared memory
// delivers the factors in 7 us; 200 thousand powers of two and 5 instructions each 7 us, after the
// products of a tile and not during them. With the exchange of the rows' sums 27 us. Forward, three
// iterations and the losses: 0.11 ms. Backward, the weights, three steps of the recursion and the
// gradient, which is two passes: 0.17 ms. With one product in place of three a pass has a third of
// the tensor instructions and takes about 16 us.
#include "monce_chip.h"

#include "monce_chip_passes.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

// Memory of all maps whose iterations a backward has to make again; and of the other blocks, of
// which there are at least kLeastBlocks if there are as many maps.
constexpr int64_t kAgainBytes = int64_t{10} << 20, kBlocksBytes = int64_t{8} << 20;
constexpr int64_t kLeastBlocks = 528;

// Writes the losses and the state or, with kBackward, the gradient of the queries.
template <bool kExp, bool kBackward>
__global__ void __launch_bounds__(kChipThreads, 1)
    contrast_on_chip(ChipProblem p, Matrices grad, Matrices query, Matrices key, float* losses,
                     void* result) {
  MGHF_DYNAMIC_SHARED(float, shared);
  ChipMap<kExp, kBackward> s(p, shared, static_cast<int>(threadIdx.x));
  // Computed again for each map, because registers are short.
  const auto block = [] { return opaque(static_cast<int>(blockIdx.x)); };
  const auto after = [&](int map) { return map + (block() < p.blocks ? p.blocks : p.again); };
  const auto resumed = [&](int map) {
    return kBackward ? s.resumable(map) : 0;
  };
  int map = block() < p.blocks ? block() : block() - p.blocks;
  MGHF_UNROLL(1)
  while (true) {
    // The iterations of a map with a state are not made again.
    while (kBackward && p.again > 0 && map < p.maps && (block() < p.blocks) != (resumed(map) > 0)) {
      map = after(map);
    }
    if (map >= p.maps) return;
    s.begin(query, key, map, resumed(map), block());
    s.run(grad, key, losses, result);
    if constexpr (kBackward) {
      s.again().finish_gradient(query, result);
    } else {
      s.again().finish(losses);
    }
    map = after(s.state.map);
    __syncthreads();  // the next map's state
  }
}

bool differentiates(const MonceOptions& options, int64_t n) {
  return options.differentiate_plan && n > 2;
}

// Blocks for that many maps, each with so many bytes.
int64_t blocks_within(int64_t all_bytes, int64_t bytes, int64_t least, int64_t maps) {
  const int64_t blocks = all_bytes / bytes > least ? all_bytes / bytes : least;
  return blocks < maps ? blocks : maps;
}

// The workspace is handed out by `pieces`.
ChipProblem chip_problem(int64_t n, int64_t batch, const MonceOptions& options, bool once,
                         bool backward, KeptIterates kept, Pieces& pieces) {
  constexpr double kLog2E = 1.4426950408889634;
  const double sign = options.transport.cost == TransportCost::easy ? -1 : 1;
  const double plan = sign * kLog2E / options.transport.epsilon;
  const double contrast = kLog2E / options.temperature;
  const bool linear = options.transport.cost != TransportCost::exp;
  const int64_t iterations = options.transport.iterations;
  const ChipDivision division(n);
  const bool exact = backward && differentiates(options, n);
  const int64_t terms = iterations < kShortIterations ? iterations + 1 : kShortIterations + 1;
  const int64_t of_queries = int64_t{division.rows} * kPatchWords;
  const int64_t of_terms = exact ? ChipTerms::floats(division, terms) : 0;
  const int64_t of_repeated = ChipTerms::repeated_floats(division, n, iterations);
  const int64_t blocks =
      blocks_within(kBlocksBytes, 16 * of_queries + 4 * of_terms, kLeastBlocks, batch);
  const int64_t again =
      exact ? blocks_within(kAgainBytes, 16 * of_queries + 4 * of_repeated, 1, batch) : 0;
  uint4* const queries = pieces.take<uint4>((blocks + again) * of_queries);
  float* const of_blocks = pieces.take<float>(blocks * of_terms);
  float* const of_again = pieces.take<float>(again * of_repeated);
  return {static_cast<int>(n),
          static_cast<int>(batch),
          static_cast<int>(iterations),
          static_cast<int>(blocks),
          kept.numbers(n),
          once,
          division,
          kept,
          Factor(plan),
          Factor(linear ? plan + contrast : plan),
          Factor(contrast),
          static_cast<float>(1 / options.temperature),
          static_cast<float>(log(options.negative_weight * static_cast<double>(n - 1))),
          exact ? static_cast<float>(sign / options.transport.epsilon) : 0,
          static_cast<int>(terms),
          static_cast<int>(again),
          of_blocks,
          of_again,
          queries};
}

template <bool kBackward>
const char* launch_on_chip(const ChipProblem& p, const MonceOptions& options,
                           const Matrices& grad, const Matrices& query, const Matrices& key,
                           float* losses, void* result, Stream stream) {
  const Grid grid{int64_t{p.blocks} + p.again, p.division.threads(),
                  p.division.shared_bytes(kBackward)};
  const auto kernel = options.transport.cost == TransportCost::exp
                          ? contrast_on_chip<true, kBackward>
                          : contrast_on_chip<false, kBackward>;
  return launch(kernel, grid, stream, p, grad, query, key, losses, result);
}

}  // namespace

bool fits_chip(int64_t n, int64_t depth, const MonceOptions& options, int64_t shared_bytes) {
  constexpr double kLeastEpsilon = 0.05;
  if (n < 2 || n > kMostOnChip || depth > kMostDepth) return false;
  if (options.transport.epsilon < kLeastEpsilon) return false;
  return static_cast<int64_t>(ChipDivision(n).shared_bytes(true)) <= shared_bytes;
}

int64_t chip_workspace_bytes(int64_t batch, int64_t n, const MonceOptions& options,
                             bool backward) {
  Pieces pieces;
  chip_problem(n, batch, options, false, backward, {}, pieces);
  return pieces.bytes();
}

const char* monce_on_chip(const Matrices& query, const Matrices& key, const MonceOptions& options,
                          float* losses, int* state, int slots, void* workspace, Stream stream) {
  Pieces pieces(workspace);
  const ChipProblem p =
      chip_problem(query.rows, query.batch, options, query.once, false, {state, slots}, pieces);
  return launch_on_chip<false>(p, options, {}, query, key, losses, nullptr, stream);
}

const char* monce_backward_on_chip(const Matrices& grad, const Matrices& query,
                                   const Matrices& key, const int* state, int slots,
                                   const MonceOptions& options, void* grad_query, void* workspace,
                                   Stream stream) {
  Pieces pieces(workspace);
  const KeptIterates kept{const_cast<int*>(state), slots};  // is only read
  const ChipProblem p =
      chip_problem(query.rows, query.batch, options, query.once, true, kept, pieces);
  return launch_on_chip<true>(p, options, grad, query, key, nullptr, grad_query, stream);
}

}  // namespace mghf::cuda
