// A cluster of up to four blocks that solves a map of `monce` on chip: a block's memory, its
// patches, their products, and the exchange of sums among the blocks. For the mathematics see
// monce.cu and sinkhorn_solver.h.
//
// Method. A block keeps the keys of up to 448 columns in shared memory, as two halves each, and a
// warpgroup of it makes similarities of 64 rows and 112 of these columns, in registers; they are
// made again in every pass. A map of up to 448 patches is a block's alone, which has as many
// warpgroups as the map needs; two or three such blocks may share a multiprocessor. A pass goes
// through all rows, tile by tile, all blocks at once: powers of two, each thread's part of a row's
// sum with the columns' weights, and one barrier of the cluster, after which every warp adds up the
// sums of its 16 rows from the memories of all blocks, in their order. Then it knows the row's
// coefficient and adds the row, still in registers, to its columns' sums. An iteration is a pass;
// so are the losses, a step of the recursion backwards, and the gradient. Nothing of N x N numbers
// is in memory.
//
// The queries are packed once for all passes, in device memory, in the order in which threads load
// them as factors of products. A tile is copied while the one before it is used.
//
// Products. Queries and keys are multiplied by a power of two each and written as two halves (see
// halves.h). The small products of a tile come first and the large ones last, since tensor cores
// truncate each sum: so they cut off four times at the sum's full size.
//
// Range. As in monce_chip_block.h: a map whose sums leave [1e-33, 1e33] becomes a NaN, which the
// kernels of monce.cu then solve.
#pragma once

#include "halves.h"
#include "monce_chip_passes.h"
#include "wgmma.h"

namespace mghf::cuda {

namespace {

constexpr int kClusterParts = 4;     // warpgroups of a block, at most
constexpr int kPartTiles = 14;       // of 8 columns
constexpr int kPartColumns = 8 * kPartTiles;
constexpr int kBlockColumns = kClusterParts * kPartColumns;  // at most
constexpr int kClusterThreads = kClusterParts * kWarpgroup;
constexpr int kClusterRegisters = 128;  // of a thread, at most, as there are that many threads
constexpr int kMostClusterBlocks = 4;
constexpr int kClusterRows = 64;     // of a tile
constexpr int kProductSteps = kMostDepth / 16;
// Keys lie in cores of 8 patches by 8 depths, as wgmma.h has them; in bytes.
constexpr int kCore = 128, kEightPatches = kMostDepth / 8 * kCore;
// Bytes of the big parts of a warpgroup's columns, and of the small ones after them.
constexpr int kKeyBytes = kPartTiles * kEightPatches;
// Words of 16 bytes of a tile of queries: for each of 4 warps and each step the big parts, then the
// small ones, of all lanes.
constexpr int kTileWords = 4 * kProductSteps * 2 * kWarp;
constexpr int kSumDepth = 16;        // of the gradient, added up at a time: registers are short
constexpr int kJoinedPitch = kSumDepth + 8;  // numbers of a row in it, so that banks differ

// What all threads of a block know; in shared memory, because registers are short. Thread 0 writes
// it, and the blocks of a cluster come to the same numbers.
struct ClusterState {
  int cluster, rank, map;  // of the grid; the block's in it
  float unit, key_back;  // of products; of keys
  float plan, plan_low, weight, weight_low;
  Pass pass;
  int t, made;  // the iteration, or the step of the recursion backwards; iterations made
  bool failed, fits;  // whether sums left float32's range, the state's range
  bool begun, resumed;  // whether the step's term has a value; whether there was a state
  float negligible;
  Settling settling;
  int first_term, last_term;  // of the gradient, from 0
  // u of an iteration to be stored, or of a step, and its v; null if there are none.
  float *u, *v, *old_v;
  float *terms, *iterates;  // of the cluster; u of the first iteration
  int width, pitch;         // from u to v, to the next iteration's u
  float2 *columns, *rows;  // of the step's term
};

// How a map is divided, and a block's shared memory, in numbers. Only what a map needs is taken, so
// that several blocks of few warpgroups share a multiprocessor.
struct ClusterDivision {
  int blocks, parts, tiles, rows;  // of a cluster; warpgroups of a block; of rows; with padding
  int columns, share;              // of a block; the rows of a tile that it writes
  int joined, keys, of_rows;       // where arrays of the block begin

  explicit ClusterDivision(int64_t n)
      : blocks(static_cast<int>((n + kBlockColumns - 1) / kBlockColumns)),
        parts(blocks > 1 ? kClusterParts
                         : static_cast<int>((n + kPartColumns - 1) / kPartColumns)),
        tiles(static_cast<int>((n + kClusterRows - 1) / kClusterRows)),
        rows(tiles * kClusterRows),
        columns(parts * kPartColumns),
        share((kClusterRows + blocks - 1) / blocks),
        joined(kWeights + 2 * columns) {
    const int of_depths = (blocks > 1 ? 2 : 1) * kClusterRows * kJoinedPitch;
    const int of_columns = 4 * columns;
    keys = joined + (of_depths > of_columns ? of_depths : of_columns);
    of_rows = keys + parts * 2 * kKeyBytes / 4;
  }
  int threads() const { return parts * kWarpgroup; }
  __host__ __device__ int all_columns() const { return blocks * columns; }
  size_t shared_bytes() const {
    return static_cast<size_t>(of_rows + kVectors * rows) * sizeof(float);
  }

  static constexpr int kQueries = (sizeof(ClusterState) + 15) / 16 * 4;
  // A tile's rows of parts: three of them.
  static constexpr int kExchanged = kQueries + 2 * kTileWords * 4;
  static constexpr int kRanges = kExchanged + 3 * kClusterRows * kClusterParts;  // twice 4
  static constexpr int kOfWarps = kRanges + 8;
  // Weights of the columns, then their dg. At `joined` the sums of 4 warps' rows, or, in the
  // gradient's last pass, of the rows of a tile.
  static constexpr int kWeights = kOfWarps + 8 * kClusterParts * kWarpgroup / kWarp;
  static constexpr int kVectors = 6;
};

// Numbers of a cluster in device memory for the gradient: its terms, then iterates that it made
// again.
struct ClusterTerms {
  float* numbers;
  int columns, rows;

  __host__ __device__ static int64_t floats(const ClusterDivision& division, int64_t terms) {
    return 2 * terms * (division.all_columns() + division.rows);
  }
  // (c, v) of a column and (u, r) of a row, as in ChipTerms.
  __device__ __forceinline__ float2* of_columns(int term) const {
    return reinterpret_cast<float2*>(numbers) + int64_t{term} * (columns + rows);
  }
  __device__ __forceinline__ float2* of_rows(int term) const { return of_columns(term) + columns; }
};

struct ClusterProblem {
  int n, maps, iterations;
  // All clusters, and those among them that have memory to make a map's iterations again in a
  // backward that goes through the plan.
  int clusters, again;
  ClusterDivision division;
  KeptIterates kept;
  Factor plan, weight, contrast;  // similarity to exponent of K, of w without v, of e^(s / t)
  float inverse_temperature, log_weight;  // as in monce.cu
  float slope;  // likewise; 0 unless the backward goes through the plan
  float negligible_part;  // of the sum of |r|: what the recursion may leave out
  bool exact;   // whether it does
  bool once, once_by_keys;  // whether the big parts are enough, for similarities, for the gradient
  uint4* queries;  // packed, of each cluster
  float *terms, *repeated;  // of each cluster, for either kind of maps
  int64_t terms_floats, repeated_floats, history_floats;
};

// Products of a thread: rows g and g + 8 of the warp's, see wgmma.h.
using Products112 = float[kPartColumns / 2];

// Two neighbours in each of some rows of a map, `apart` rows apart; zeros beyond it. All are read
// before the first is used.
template <int kCount>
__device__ __forceinline__ void read_pairs(float2 (&to)[kCount], const Matrices& m, int map, int i,
                                           int apart, int d) {
  const bool whole = m.element == Element::float32;
  const int64_t bytes = whole ? 4 : 2, right = m.column_stride * bytes;
  const int64_t down = apart * m.row_stride * bytes;
  const unsigned char* from =
      static_cast<const unsigned char*>(m.data) +
      (map * m.batch_stride + i * m.row_stride + d * m.column_stride) * bytes;
  const auto read = [&](auto word) {
    using Word = decltype(word);
    const auto bits = [&](const unsigned char* at, bool inside) {
      promise_global(at);
      const Word x = inside ? *reinterpret_cast<const Word*>(at) : Word{0};
      return bits_as<float>(static_cast<uint32_t>(x) << (32 - 8 * sizeof(Word)));
    };
    MGHF_UNROLL_ALL
    for (int k = 0; k < kCount; ++k) {
      const bool inside = i + k * apart < m.rows;
      to[k].x = bits(from, inside && d < m.columns);
      to[k].y = bits(from + right, inside && d + 1 < m.columns);
      from += down;
    }
  };
  if (whole) return read(uint32_t{});
  // Both types of 16 bits are read by the same code, first as the upper half of a float32.
  read(uint16_t{});
  if (m.element == Element::bfloat16) return;
  const auto half = [](float x) {
    return to_float(Half{static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16)});
  };
  MGHF_UNROLL_ALL
  for (int k = 0; k < kCount; ++k) to[k] = {half(to[k].x), half(to[k].y)};
}
// Calls use(j, d, pair) for the thread's share of the pairs in `count` rows from `first` on: row j
// of them, depth d. Some rows may be beyond the last, to a multiple of 4 a warp.
template <class Use>
__device__ __forceinline__ void for_pairs(const Matrices& m, int map, int first, int count,
                                          const Use& use) {
  constexpr int kAhead = 4;
  static_assert(kMostDepth == 2 * kWarp && kPartColumns % (kAhead * kWarpgroup / kWarp) == 0);
  const int thread = static_cast<int>(threadIdx.x), d = thread % kWarp * 2;
  const int apart = static_cast<int>(blockDim.x) / kWarp;
  MGHF_UNROLL(1)
  for (int j = thread / kWarp; j < count; j += kAhead * apart) {
    float2 pairs[kAhead];
    read_pairs(pairs, m, map, first + j, apart, d);
    // In a loop that turns the registers: its body is long.
    MGHF_UNROLL(1)
    for (int k = 0; k < kAhead; ++k) {
      use(j + k * apart, d, pairs[0]);
      MGHF_UNROLL_ALL
      for (int next = 1; next < kAhead; ++next) pairs[next - 1] = pairs[next];
    }
  }
}
// Combines a number of all threads of a cluster. Barriers before and after; there must be one of
// the cluster between two uses of a place, 0 or 1.
template <class Combine>
__device__ __forceinline__ float across_cluster(float x, int blocks, float* shared, int place,
                                                const Combine& combine) {
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / kWarp;
  float* const of_warps = shared + ClusterDivision::kOfWarps;
  x = across_lanes(x, combine);
  if (thread % kWarp == 0) of_warps[thread / kWarp] = x;
  __syncthreads();
  x = of_warps[0];
  MGHF_UNROLL(1)
  for (int w = 1; w < warps; ++w) x = combine(x, of_warps[w]);
  float* const own = shared + ClusterDivision::kRanges + 4 * place;
  if (thread == 0) *own = x;
  sync_cluster();
  x = *of_block(own, 0);
  MGHF_UNROLL(1)
  for (int r = 1; r < blocks; ++r) x = combine(x, *of_block(own, static_cast<unsigned>(r)));
  return x;
}

// What is done with the patches of a map.
enum class Patches { measure, pack_queries, pack_keys };

// Goes through a block's share of a map's patches, `count` from `first` on. Returns the thread's
// largest magnitude, infinity if a number is not finite; or packs them, times a power of two:
// queries at `to` in device memory, of `rows` with padding, in the order in which threads load
// them, or keys at `to` in shared memory. One function for all, not inlined, as it is long.
inline __device__ MGHF_NOINLINE float go_through_patches(Patches action, Matrices m, int map,
                                                         int first, int count, float by, int rows,
                                                         uint32_t* keys, uint32_t* queries) {
  promise_shared(keys);
  promise_global(queries);
  float most = 0;
  for_pairs(m, map, first, count, [&](int j, int d, const float2& two) {
    if (action == Patches::measure) {
      const float a = fabsf(two.x), b = fabsf(two.y);
      most = a <= most ? most : a < INFINITY ? a : INFINITY;
      most = b <= most ? most : b < INFINITY ? b : INFINITY;
      return;
    }
    const SplitHalves halves(two.x * by, two.y * by);
    if (action == Patches::pack_keys) {
      uint32_t* const to = keys + (j / kPartColumns * kKeyBytes + j / 8 * kEightPatches +
                                   d / 8 * kCore + j % 8 * 16 + d % 8 * 2) /
                                      4;
      to[0] = halves.big, to[kKeyBytes / 4] = halves.small;
      return;
    }
    const int i = first + j;
    if (j >= count || i >= rows) return;
    // Sixteen rows' step of 16 depths: a word for each lane, of four pairs.
    uint32_t* const to = queries + (i / 16 * kProductSteps + d / 16) * 2 * 4 * kWarp +
                         (i % 8 * 4 + d % 8 / 2) * 4 + d % 16 / 8 * 2 + i % 16 / 8;
    to[0] = halves.big, to[4 * kWarp] = halves.small;
  });
  return most;
}

struct ClusterBlock {
  const ClusterProblem& p;
  float* const shared;
  const int n, thread, lane, warp, part, g, t;
  const int rank, first;  // of the cluster's blocks; the block's first column

  // Registers are too short for all that depends on the thread's number: phases begin with an
  // object of their own, from an opaque number, in which it is computed again.
  __device__ __forceinline__ ClusterBlock(const ClusterProblem& p, float* shared, int thread)
      : p(p),
        shared(shared),
        n(p.n),
        thread(thread),
        lane(thread & (kWarp - 1)),
        warp(thread >> 5 & 3),
        part(thread >> 7),
        g(lane >> 2),
        t(lane & 3),
        rank(state().rank),
        first(rank * p.division.columns) {}

  __device__ __forceinline__ ClusterBlock again() const {
    return ClusterBlock(p, shared, opaque(static_cast<int>(threadIdx.x)));
  }

  __device__ __forceinline__ ClusterState& state() const {
    return *reinterpret_cast<ClusterState*>(shared);
  }
  __device__ __forceinline__ int cluster() const {
    return state().cluster;
  }
  __device__ __forceinline__ float* weights() const { return shared + ClusterDivision::kWeights; }
  __device__ __forceinline__ float* dg() const { return weights() + p.division.columns; }
  __device__ __forceinline__ float* of_columns() const { return shared + p.division.joined; }
  __device__ __forceinline__ float* of_warps() const { return shared + ClusterDivision::kOfWarps; }
  __device__ __forceinline__ unsigned char* keys() const {
    return reinterpret_cast<unsigned char*>(shared + p.division.keys);
  }
  __device__ __forceinline__ uint4* queries(int tile) const {
    return reinterpret_cast<uint4*>(shared + ClusterDivision::kQueries) + tile % 2 * kTileWords;
  }
  // Numbers of a row: the exponents a and those of w, u, r, r / sum_j w, s_ii.
  __device__ __forceinline__ float* of_row(int i) const {
    return shared + p.division.of_rows + ClusterDivision::kVectors * i;
  }
  __device__ __forceinline__ float& base(int i) const { return of_row(i)[0]; }
  __device__ __forceinline__ float& top(int i) const { return of_row(i)[1]; }
  __device__ __forceinline__ float& factor(int i) const { return of_row(i)[2]; }
  __device__ __forceinline__ float& share(int i) const { return of_row(i)[3]; }
  __device__ __forceinline__ float& scaled(int i) const { return of_row(i)[4]; }
  __device__ __forceinline__ float& positive(int i) const { return of_row(i)[5]; }

  __device__ __forceinline__ int threads() const { return static_cast<int>(blockDim.x); }

  // The first of the warp's rows, and of the thread's columns in the block.
  __device__ __forceinline__ int warp_row(int tile) const {
    return tile * kClusterRows + 16 * warp;
  }
  __device__ __forceinline__ int left() const { return part * kPartColumns + 2 * t; }

  // ---- the patches ----

  // The cluster's queries, packed.
  __device__ __forceinline__ uint4* packed() const {
    uint4* const from = p.queries + int64_t{cluster()} * p.division.tiles * kTileWords;
    promise_global(from);
    return from;
  }
  // Begins to copy a tile of queries, into the place of the last but one.
  __device__ __forceinline__ void copy_queries(int tile) const {
    const uint4* const from = packed() + tile * kTileWords;
    uint4* const to = queries(tile);
    MGHF_UNROLL(1)
    for (int x = thread; x < kTileWords; x += threads()) copy_async<16>(to + x, from + x);
    end_copies();
  }

  // Begins the state's map. A barrier of the cluster at the end.
  __device__ __forceinline__ void load(const Matrices& query, const Matrices& key) const {
    const int share = (p.division.rows + p.division.blocks - 1) / p.division.blocks;
    // The largest of the queries, and of the keys; then either are packed.
    PowerOfTwo scales[2] = {PowerOfTwo(1), PowerOfTwo(1)};
    bool finite = true;
    MGHF_UNROLL(1)
    for (int step = 0; step < 4; ++step) {
      const bool keys = step % 2 != 0, packs = step >= 2, shares = packs && !keys;
      const int from = shares ? rank * share : first;
      const int count = shares ? share : p.division.columns;
      const float most = go_through_patches(
          !packs ? Patches::measure : keys ? Patches::pack_keys : Patches::pack_queries,
          keys ? key : query, state().map, from, count, scales[0].by, p.division.rows,
          reinterpret_cast<uint32_t*>(this->keys()), reinterpret_cast<uint32_t*>(packed()));
      // After the second step the first scale is the queries', and after the third the keys'.
      PowerOfTwo next = scales[0];
      if (!packs) {
        const float of_map = across_cluster(most, p.division.blocks, shared, step, Most{});
        finite = finite && of_map < INFINITY;
        next = PowerOfTwo(of_map);
      }
      scales[0] = scales[1], scales[1] = next;
    }
    if (thread == 0) {
      const float unit = scales[0].back * scales[1].back;
      state().unit = unit;
      state().key_back = scales[1].back;
      state().plan = factor_that_hides(p.plan.value * unit);
      state().weight = factor_that_hides(p.weight.value * unit);
      state().plan_low = p.plan.low * unit, state().weight_low = p.weight.low * unit;
      state().failed = !finite;
    }
    publish_shared();
    sync_cluster();
  }

  // ---- products ----

  // x = the products of the warpgroup's rows and columns, in units of 1 / unit.
  __device__ __forceinline__ void multiply(Products112& x, int tile) const {
    MGHF_UNROLL_ALL
    for (float& sum : x) sum = 0;
    const uint4* const own = queries(tile) + warp * kProductSteps * 2 * kWarp + lane;
    const SharedColumns big(keys() + part * 2 * kKeyBytes, kCore, kEightPatches);
    const SharedColumns small = big.further(kKeyBytes);
    uint32_t a[2][2][4];
    const auto load_factor = [&](uint32_t(&to)[4], int word) {
      const uint4 four = own[word * kWarp];
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    };
    const auto add_big = [&] {
      MGHF_UNROLL_ALL
      for (int step = 0; step < kProductSteps; ++step) {
        load_factor(a[step / 2][step % 2], 2 * step);
      }
      begin_products();
      MGHF_UNROLL_ALL
      for (int step = 0; step < kProductSteps; ++step) {
        multiply_add_later<kPartColumns>(x, a[step / 2][step % 2], big.further(2 * kCore * step));
      }
      end_products();
      wait_for_products<0>();
    };
    if (p.once) return add_big();
    MGHF_UNROLL_ALL
    for (int step = 0; step < kProductSteps; ++step) {
      uint32_t(&factors)[2][4] = a[step % 2];
      load_factor(factors[0], 2 * step);
      load_factor(factors[1], 2 * step + 1);
      begin_products();
      multiply_add_later<kPartColumns>(x, factors[1], big.further(2 * kCore * step));
      multiply_add_later<kPartColumns>(x, factors[0], small.further(2 * kCore * step));
      end_products();
      wait_for_products<1>();
    }
    wait_for_products<0>();
    add_big();
  }

  // ---- entries ----

  // Calls f(entry, half, c, i) for the thread's entries: its row 0 or 1, tile of 8 columns, column
  // 0 or 1 of that.
  template <class F>
  __device__ __forceinline__ static void for_entries(Products112& x, const F& f) {
    MGHF_UNROLL_ALL
    for (int c = 0; c < kPartTiles; ++c) {
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) f(x[4 * c + 2 * half + i], half, c, i);
      }
    }
  }

  // Row less column of the thread's first entry: on the diagonal it is below().
  __device__ __forceinline__ int above(int tile) const {
    return warp_row(tile) + g - first - left();
  }
  static __device__ __forceinline__ int below(int half, int c, int i) {
    return 8 * c + i - 8 * half;
  }

  // Writes `nothing` over the entries of the diagonal, which go to positive(), and, if `beyond`,
  // over those beyond the map.
  __device__ __forceinline__ void hide(Products112& x, int tile, float nothing,
                                       bool beyond) const {
    const int first_row = warp_row(tile), column = first + part * kPartColumns;
    hide_diagonal(x, first_row - column, &positive(first_row + g), nothing);
    if (beyond && column + kPartColumns > n) {
      const int inside = n - first - left();
      for_entries(x, [&](float& entry, int, int c, int i) {
        entry = 8 * c + i >= inside ? nothing : entry;
      });
    }
  }

  // The diagonal of 16 rows begins that many columns further right than the warp's: a multiple of
  // 16, so that its entries are in two known tiles of 8 columns.
  __device__ __forceinline__ void hide_diagonal(Products112& x, int right, float* own_row,
                                                float nothing) const {
    static_assert(kPartColumns % 16 == 0 && kClusterRows % 16 == 0);
    const int own = g - 2 * t;  // of the two columns that a thread has in a tile
    MGHF_UNROLL_ALL
    for (int c = 0; c < kPartTiles; c += 2) {
      if (right != 8 * c) continue;
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          if (own != i) continue;
          float& entry = x[4 * (c + half) + 2 * half + i];
          own_row[8 * half * ClusterDivision::kVectors] = entry;
          entry = nothing;
        }
      }
    }
  }

  // The sum or the largest of the numbers of each row over the cluster. Returns that of row
  // lane % 16 of the warp's. A barrier of the cluster; there must be another one between two uses of
  // a place, 0, 1 or 2.
  __device__ __forceinline__ float across_rows(float (&x)[2], int place, bool largest) const {
    const auto combine = [&](float a, float b) { return largest ? fmaxf(a, b) : a + b; };
    float* const places =
        shared + ClusterDivision::kExchanged + place * kClusterRows * kClusterParts;
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      x[half] = combine(x[half], __shfl_xor_sync(~0u, x[half], 1));
      x[half] = combine(x[half], __shfl_xor_sync(~0u, x[half], 2));
      if (t == 0) places[(16 * warp + 8 * half + g) * kClusterParts + part] = x[half];
    }
    sync_cluster();
    float4* const own =
        reinterpret_cast<float4*>(places + (16 * warp + lane % 16) * kClusterParts);
    const auto of_four = [&](const float4& four) {
      return combine(combine(four.x, four.y), combine(four.z, four.w));
    };
    if (p.division.blocks == 1) {
      const float4 four = *own;
      if (p.division.parts == 1) return four.x;
      if (p.division.parts == 2) return combine(four.x, four.y);
      return p.division.parts == 3 ? combine(combine(four.x, four.y), four.z) : of_four(four);
    }
    float total = 0;
    MGHF_UNROLL_ALL
    for (int r = 0; r < kMostClusterBlocks; ++r) {
      if (r >= p.division.blocks) continue;
      const float of_rank = of_four(*of_block(own, static_cast<unsigned>(r)));
      total = r == 0 ? of_rank : combine(total, of_rank);
    }
    return total;
  }
  // From row lane % 16 to the thread's rows.
  __device__ __forceinline__ float of_half(float x, int half) const {
    return __shfl_sync(~0u, x, g + 8 * half);
  }
};

}  // namespace

}  // namespace mghf::cuda
