// A cluster of blocks that solves a map of `monce` on chip, where one block's shared memory does
// not hold the keys: a block's memory, its patches, their products, and the exchange of sums among
// the blocks. For the mathematics see monce.cu and sinkhorn_solver.h.
//
// Method. A block keeps the keys of 448 columns in shared memory, as two halves each, and a
// warpgroup of it makes similarities of 64 rows and 112 of these columns, in registers; they are
// made again in every pass. A pass goes through all rows, tile by tile, all blocks at once: powers
// of two, each thread's part of a row's sum with the columns' weights, and one barrier of the
// cluster, after which every warp adds up the sums of its 16 rows from the memories of all blocks,
// in their order. Then it knows the row's coefficient and adds the row, still in registers, to its
// columns' sums. An iteration is a pass; so are the losses, a step of the recursion backwards, and
// the gradient. Nothing of N x N numbers is in memory.
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

constexpr int kClusterParts = 4;     // warpgroups of a block
constexpr int kPartTiles = 14;       // of 8 columns
constexpr int kPartColumns = 8 * kPartTiles;
constexpr int kBlockColumns = kClusterParts * kPartColumns;
constexpr int kClusterThreads = kClusterParts * kWarpgroup;
constexpr int kMostClusterBlocks = 4;
constexpr int kClusterRows = 64;     // of a tile
constexpr int kProductSteps = kMostDepth / 16;
// Keys lie in cores of 8 patches by 8 depths, as wgmma.h has them; in bytes.
constexpr int kCore = 128, kEightPatches = kMostDepth / 8 * kCore;
constexpr int kKeyBytes = kBlockColumns / 8 * kEightPatches;  // of the big parts, or the small ones
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
  float *u, *v, *old_v;  // of an iteration to be stored, or of a step; null if there are none
  float2 *columns, *rows;  // of the step's term
};

// How a map is divided, and a block's shared memory, in numbers.
struct ClusterDivision {
  int blocks, tiles, rows;  // of a cluster, of rows; rows with padding

  explicit ClusterDivision(int64_t n)
      : blocks(static_cast<int>((n + kBlockColumns - 1) / kBlockColumns)),
        tiles(static_cast<int>((n + kClusterRows - 1) / kClusterRows)),
        rows(tiles * kClusterRows) {}
  __host__ __device__ int columns() const { return blocks * kBlockColumns; }

  static constexpr int kKeys = (sizeof(ClusterState) + 15) / 16 * 4;
  static constexpr int kQueries = kKeys + 2 * kKeyBytes / 4;
  // A tile's rows of parts: three of them.
  static constexpr int kExchanged = kQueries + 2 * kTileWords * 4;
  static constexpr int kRanges = kExchanged + 3 * kClusterRows * kClusterParts;  // twice 4
  static constexpr int kOfWarps = kRanges + 8;
  static constexpr int kWeights = kOfWarps + 8 * kClusterThreads / kWarp;
  static constexpr int kDg = kWeights + kBlockColumns;
  static constexpr int kOfColumns = kDg + kBlockColumns;  // the sums of 4 warps' rows
  static constexpr int kJoined = kOfColumns + 4 * kBlockColumns;  // twice
  static constexpr int kRows = kJoined + 2 * kClusterRows * kJoinedPitch;
  static constexpr int kMostRows = kMostClusterBlocks * kBlockColumns, kVectors = 6;
  static constexpr size_t kSharedBytes = (kRows + kVectors * kMostRows) * sizeof(float);
};

// Numbers of a cluster in device memory for the gradient: its terms, then iterates that it made
// again.
struct ClusterTerms {
  float* numbers;
  int columns, rows;

  __host__ __device__ static int64_t floats(const ClusterDivision& division, int64_t terms) {
    return 2 * terms * (division.columns() + division.rows);
  }
  // (c, v) of a column and (u, r) of a row, as in ChipTerms.
  __device__ __forceinline__ float2* of_columns(int term) const {
    return reinterpret_cast<float2*>(numbers) + int64_t{term} * (columns + rows);
  }
  __device__ __forceinline__ float2* of_rows(int term) const { return of_columns(term) + columns; }
};

struct ClusterProblem {
  int n, maps, iterations;
  ClusterDivision division;
  KeptIterates kept;
  Factor plan, weight, contrast;  // similarity to exponent of K, of w without v, of e^(s / t)
  float inverse_temperature, log_weight, slope;  // as in monce.cu
  bool exact;  // whether the backward goes through the plan
  bool once, once_by_keys;  // whether the big parts are enough, for similarities, for the gradient
  uint4* queries;  // packed, of each cluster
  float* terms;    // of each cluster
  int64_t terms_floats, history_floats;
};

// Products of a thread: rows g and g + 8 of the warp's, see wgmma.h.
using Products112 = float[kPartColumns / 2];

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
        first(rank * kBlockColumns) {}

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
  __device__ __forceinline__ float* dg() const { return shared + ClusterDivision::kDg; }
  __device__ __forceinline__ float* of_columns() const {
    return shared + ClusterDivision::kOfColumns;
  }
  __device__ __forceinline__ float* of_warps() const { return shared + ClusterDivision::kOfWarps; }
  __device__ __forceinline__ unsigned char* keys() const {
    return reinterpret_cast<unsigned char*>(shared + ClusterDivision::kKeys);
  }
  __device__ __forceinline__ uint4* queries(int tile) const {
    return reinterpret_cast<uint4*>(shared + ClusterDivision::kQueries) + tile % 2 * kTileWords;
  }
  // Numbers of rows: the exponents a, u, the exponents of w, r, r / sum_j w, s_ii.
  __device__ __forceinline__ float* of_rows(int which) const {
    return shared + ClusterDivision::kRows + which * ClusterDivision::kMostRows;
  }
  __device__ __forceinline__ float* base() const { return of_rows(0); }
  __device__ __forceinline__ float* factor() const { return of_rows(1); }
  __device__ __forceinline__ float* top() const { return of_rows(2); }
  __device__ __forceinline__ float* share() const { return of_rows(3); }
  __device__ __forceinline__ float* scaled() const { return of_rows(4); }
  __device__ __forceinline__ float* positive() const { return of_rows(5); }

  // The first of the warp's rows, and of the thread's columns in the block.
  __device__ __forceinline__ int warp_row(int tile) const {
    return tile * kClusterRows + 16 * warp;
  }
  __device__ __forceinline__ int left() const { return part * kPartColumns + 2 * t; }

  // ---- the patches ----

  // Combines a number of all threads of a cluster. Barriers before and after; there must be one of
  // the cluster between two uses of a place, 0 or 1.
  template <class Combine>
  __device__ __forceinline__ float across_cluster(float x, int place,
                                                  const Combine& combine) const {
    x = across_lanes(x, combine);
    if (lane == 0) of_warps()[thread / kWarp] = x;
    __syncthreads();
    x = of_warps()[0];
    MGHF_UNROLL(1)
    for (int w = 1; w < kClusterThreads / kWarp; ++w) x = combine(x, of_warps()[w]);
    float* const own = shared + ClusterDivision::kRanges + 4 * place;
    if (thread == 0) *own = x;
    sync_cluster();
    x = *of_block(own, 0);
    MGHF_UNROLL(1)
    for (int r = 1; r < p.division.blocks; ++r) {
      x = combine(x, *of_block(own, static_cast<unsigned>(r)));
    }
    return x;
  }

  // Two neighbours in each of some rows, `apart` rows apart; zeros beyond the map. All are read
  // before the first is used.
  template <int kCount>
  __device__ __forceinline__ void read_pairs(float2 (&to)[kCount], const Matrices& m, int i,
                                             int apart, int d) const {
    const auto read = [&](const auto& matrix) {
      promise_global(matrix.data);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kCount; ++k) {
        const bool inside = i + k * apart < n;
        to[k].x = inside && d < m.columns ? matrix(i + k * apart, d) : 0.0f;
        to[k].y = inside && d + 1 < m.columns ? matrix(i + k * apart, d + 1) : 0.0f;
      }
    };
    if (m.element == Element::float32) return read(m.matrix<float>(state().map));
    // Both types of 16 bits are read by the same code, first as the upper half of a float32.
    read(m.matrix<BFloat16>(state().map));
    if (m.element == Element::bfloat16) return;
    const auto half = [](float x) {
      return to_float(Half{static_cast<uint16_t>(bits_as<uint32_t>(x) >> 16)});
    };
    MGHF_UNROLL_ALL
    for (int k = 0; k < kCount; ++k) to[k] = {half(to[k].x), half(to[k].y)};
  }
  // Calls use(j, d, pair) for the thread's share of the pairs in as many rows as the block has
  // columns: row j of them, depth d.
  template <class Use>
  __device__ __forceinline__ void for_pairs(const Matrices& m, const Use& use) const {
    constexpr int kAhead = 4, kApart = 2 * kClusterThreads / kMostDepth;
    const int d = thread % (kMostDepth / 2) * 2;
    MGHF_UNROLL(1)
    for (int j = thread / (kMostDepth / 2); j < kBlockColumns; j += kAhead * kApart) {
      float2 pairs[kAhead];
      read_pairs(pairs, m, first + j, kApart, d);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kAhead; ++k) use(j + k * kApart, d, pairs[k]);
    }
  }

  // The largest magnitude of a map, infinity if any number is not finite.
  __device__ __forceinline__ float largest(const Matrices& m, int place) const {
    float most = 0;
    for_pairs(m, [&](int, int, const float2& two) {
      const float a = fabsf(two.x), b = fabsf(two.y);
      most = a <= most ? most : a < INFINITY ? a : INFINITY;
      most = b <= most ? most : b < INFINITY ? b : INFINITY;
    });
    return across_cluster(most, place, Most{});
  }

  __device__ __forceinline__ void pack_keys(const Matrices& key, float by) const {
    for_pairs(key, [&](int j, int d, const float2& two) {
      const SplitHalves halves(two.x * by, two.y * by);
      unsigned char* const to =
          keys() + j / 8 * kEightPatches + d / 8 * kCore + j % 8 * 16 + d % 8 * 2;
      *reinterpret_cast<uint32_t*>(to) = halves.big;
      *reinterpret_cast<uint32_t*>(to + kKeyBytes) = halves.small;
    });
  }

  // The cluster's queries, packed.
  __device__ __forceinline__ uint4* packed() const {
    uint4* const from = p.queries + int64_t{cluster()} * p.division.tiles * kTileWords;
    promise_global(from);
    return from;
  }
  // The block's share of them.
  __device__ __forceinline__ void pack_queries(const Matrices& query, float by) const {
    const int step = thread / kWarp % 4, of_warp = thread / kWarp / 4, d = 16 * step + 2 * t;
    MGHF_UNROLL(1)
    for (int tile = rank; tile < p.division.tiles; tile += p.division.blocks) {
      const int i = tile * kClusterRows + 16 * of_warp + g;
      float2 two[2][2];
      MGHF_UNROLL_ALL
      for (int k = 0; k < 2; ++k) read_pairs(two[k], query, i, 8, d + 8 * k);
      uint32_t big[4], small[4];
      MGHF_UNROLL_ALL
      for (int k = 0; k < 4; ++k) {
        const float2& pair = two[k / 2][k % 2];
        const SplitHalves halves(pair.x * by, pair.y * by);
        big[k] = halves.big, small[k] = halves.small;
      }
      uint4* const to =
          packed() + tile * kTileWords + (of_warp * kProductSteps + step) * 2 * kWarp + lane;
      to[0] = {big[0], big[1], big[2], big[3]};
      to[kWarp] = {small[0], small[1], small[2], small[3]};
    }
  }

  // Begins to copy a tile of queries, into the place of the last but one.
  __device__ __forceinline__ void copy_queries(int tile) const {
    const uint4* const from = packed() + tile * kTileWords;
    uint4* const to = queries(tile);
    MGHF_UNROLL_ALL
    for (int x = 0; x < kTileWords; x += kClusterThreads) {
      copy_async<16>(to + x + thread, from + x + thread);
    }
    end_copies();
  }

  // Begins the state's map. A barrier of the cluster at the end.
  __device__ __forceinline__ void load(const Matrices& query, const Matrices& key) const {
    const float of_query = largest(query, 0), of_key = largest(key, 1);
    const PowerOfTwo by_query(of_query), by_key(of_key);
    if (thread == 0) {
      const float unit = by_query.back * by_key.back;
      state().unit = unit;
      state().key_back = by_key.back;
      state().plan = p.plan.value * unit, state().plan_low = p.plan.low * unit;
      state().weight = p.weight.value * unit, state().weight_low = p.weight.low * unit;
      state().failed = !(of_query < INFINITY && of_key < INFINITY);
    }
    again().pack_queries(query, by_query.by);
    again().pack_keys(key, by_key.by);
    publish_shared();
    sync_cluster();
  }

  // ---- products ----

  // x = the products of the warpgroup's rows and columns, in units of 1 / unit.
  __device__ __forceinline__ void multiply(Products112& x, int tile) const {
    MGHF_UNROLL_ALL
    for (float& sum : x) sum = 0;
    const uint4* const own = queries(tile) + warp * kProductSteps * 2 * kWarp + lane;
    const SharedColumns big(keys() + part * kPartTiles * kEightPatches, kCore, kEightPatches);
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

  // Whether some of the warp's entries in a tile do not count: on the diagonal, or beyond the map.
  __device__ __forceinline__ bool any_hidden(int tile) const {
    const int row = warp_row(tile), column = first + part * kPartColumns;
    return (row < column + kPartColumns && column < row + 16) || column + kPartColumns > n;
  }
  // Row less column of the thread's first entry: on the diagonal it is below().
  __device__ __forceinline__ int above(int tile) const {
    return warp_row(tile) + g - first - left();
  }
  static __device__ __forceinline__ int below(int half, int c, int i) {
    return 8 * c + i - 8 * half;
  }

  // Writes `nothing` over the entries that do not count; if `keep`, those of the diagonal go to
  // positive().
  __device__ __forceinline__ void hide(Products112& x, int tile, float nothing, bool keep) const {
    if (!any_hidden(tile)) return;
    const int own = above(tile), inside = n - first - left();
    const int row = warp_row(tile) + g;
    for_entries(x, [&](float& entry, int half, int c, int i) {
      const bool diagonal = own == below(half, c, i);
      if (diagonal && keep && 8 * c + i < inside) positive()[row + 8 * half] = entry;
      entry = diagonal || 8 * c + i >= inside ? nothing : entry;
    });
  }

  // Combines the numbers of each row over the cluster. Returns that of row lane % 16 of the warp's.
  // A barrier of the cluster; there must be another one between two uses of a place, 0, 1 or 2.
  template <class Combine>
  __device__ __forceinline__ float across_rows(float (&x)[2], int place,
                                               const Combine& combine) const {
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
    float total = 0;
    MGHF_UNROLL_ALL
    for (int r = 0; r < kMostClusterBlocks; ++r) {
      if (r >= p.division.blocks) continue;
      const float4 four = *of_block(own, static_cast<unsigned>(r));
      const float of_rank = combine(combine(four.x, four.y), combine(four.z, four.w));
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
