// A block that solves a map of `monce` on chip: its shared memory, the patches in it, their
// products, and the exchange of sums among its warps. For the mathematics see monce.cu and
// sinkhorn_solver.h.
//
// Method. The keys stay in shared memory. Similarities are computed again in every pass and exist
// in registers only: a pass goes through the queries in tiles of rows, of which a warp takes 32
// rows and 56 columns. Its tensor cores compute s, it takes powers of two, K_ij = 2^(y_ij - a_i)
// with the rounded maximum a_i of y_ij, adds up its part of each row with the columns' weights, and
// exchanges the sums with the warps that have the row's other columns. Then it knows the row's
// coefficient and adds the row, still in its registers, to its columns' sums. An iteration is a
// pass; so are the losses, a step of the recursion backwards, and the gradient.
//
// The queries are packed as halves once for all passes, in device memory.
//
// Products. Queries and keys are scaled by a power of two each, the largest to [2^10, 2^11), and
// written as two halves: together exact to 2^-22 of a value, or to 2^-35 of the largest. The tensor
// cores truncate, so the three products of halves go to a sum of their own for every 16 of the
// depth, small ones first, which is added to the similarity with rounding. For less precision than
// float32 it is one product, of the big halves, whose mantissa is TF32's. The gradient's rows are
// scaled likewise.
//
// Range. K is not computed by sums of exponents, so iterates must be float32: for unit rows and
// epsilon >= 0.05 K is above 2^-69. A map whose sums leave [1e-33, 1e33] becomes a NaN, which the
// kernels of monce.cu then solve.
#pragma once

#include "matrix.h"
#include "mma.h"
#include "monce_numbers.h"

namespace mghf::cuda {

namespace {

constexpr int kRowTiles = 2;     // of 16 rows, of a warp
constexpr int kColumnTiles = 7;  // of 8 columns
constexpr int kWarpRows = 16 * kRowTiles, kWarpColumns = 8 * kColumnTiles;
constexpr int kRowsOfThread = 2 * kRowTiles;
constexpr int kMostGroups = 8, kMostBands = 2;
constexpr int kChipThreads = kMostGroups * kMostBands * kWarp;
constexpr int kMostOnChip = kMostGroups * kWarpColumns;
constexpr int kPatchWords = 16;  // of 16 bytes, for a patch: 8 of big parts, 8 of small ones
constexpr int kScaled = 10;      // the exponent to which factors are scaled
constexpr int kPartDepth = 16;   // of the gradient, added up at a time

enum class Pass { iterate, weigh, recur, differentiate };

// What all threads of a block know; in shared memory, because registers are short. Thread 0 writes
// it.
struct ChipState {
  int map, steps;  // the latter: depths in sixteens
  float query_exponent, key_exponent, unit, nothing;
  float plan, plan_low, weight, weight_low, contrast, contrast_low, linear;  // see exponent()
  Pass pass;
  int t, made;  // the iteration, or the step of the recursion backwards; iterations made
  bool failed, fits;  // whether sums left float32's range, the state's range
  float negligible;
  Settling settling;
  int first_term, last_term;  // of the gradient, from 0
  bool begun;  // whether the step's term has a value: iterations that were not made share one
  bool resumed, exact;  // the latter: whether the gradient goes through the plan
  // u of an iteration to be stored, or of a step, with its v after it; null if there is none.
  float *u, *old_v;
  float2 *columns, *rows;  // of the step's term
  float *terms, *iterates;  // the latter: u and v of the first iteration, in turn
  int width, pitch;         // from u to v, to the next iteration's
};
constexpr int kStateWords = (sizeof(ChipState) + 15) / 16;  // of 16 bytes
// Then come the warps' numbers, 8 of each, and the rest.
constexpr int kOfWarps = 4 * kStateWords, kFirst = kOfWarps + 8 * kMostGroups * kMostBands;

// How a map is divided among a block's warps, and its shared memory.
struct ChipDivision {
  int groups, bands, tiles;      // of columns, of a tile's rows, of rows
  int band_bits;                 // of a warp's number
  int columns, tile_rows, rows;  // with padding
  // Where arrays begin, in numbers; see ChipBlock.
  int queries, weights, dg, parts, exchanged, coefficients, unscale;
  int base, factor, top, share, scaled, positive, sums;

  explicit ChipDivision(int64_t n)
      : groups(static_cast<int>((n + kWarpColumns - 1) / kWarpColumns)),
        bands(n > kWarpRows ? kMostBands : 1),
        tiles(static_cast<int>((n + bands * kWarpRows - 1) / (bands * kWarpRows))),
        band_bits(bands - 1),
        columns(groups * kWarpColumns),
        tile_rows(bands * kWarpRows),
        rows(tiles * tile_rows) {
    // The queries are packed in the keys' place.
    const int patches = columns > rows ? columns : rows;
    int at = kFirst;
    const auto take = [&](int& array, int numbers) {
      array = at;
      at += numbers;
    };
    at += patches * kPatchWords * 4;
    take(queries, 2 * tile_rows * kPatchWords * 4);
    for (int* const array : {&weights, &dg}) take(*array, columns);
    take(parts, bands * columns);
    take(exchanged, tile_rows * kMostGroups);
    for (int* const array : {&coefficients, &unscale}) take(*array, tile_rows);
    for (int* const array : {&base, &factor, &top, &share, &scaled, &positive}) take(*array, rows);
    sums = at;
  }
  int threads() const { return groups * bands * kWarp; }
  size_t shared_bytes(bool backward) const {
    const int of_columns = 2 * kColumnTiles * threads();
    const int of_rows = backward ? groups * tile_rows * kPartDepth : 0;  // the gradient's
    const int most = of_columns > of_rows ? of_columns : of_rows;
    return static_cast<size_t>(sums + most) * sizeof(float);
  }
};

struct ChipProblem {
  int n, maps, iterations, blocks;
  int64_t state_numbers;  // of a map
  bool once;  // products are one of halves, not three
  ChipDivision division;
  KeptIterates kept;
  Factor plan, weight, contrast;  // score to exponent of K, of w without v, of e^(s / t)
  // As in monce.cu; the last is 0 unless the backward goes through the plan.
  float inverse_temperature, log_weight, slope;
  // The backward through the plan. The maps whose iterations have to be made again are left to
  // blocks of their own, after the others, as they need more memory.
  int short_terms, again;  // terms of the other maps; number of those blocks, 0 without the plan
  float *terms, *repeated;  // terms of the maps; terms and iterates of the blocks that make them
  uint4* queries;  // packed, of each block
};

// The thread's number, read again instead of being kept in a register.
__device__ __forceinline__ int thread_again() {
#ifdef __CUDA_ARCH__
  int number;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(number));
  return number;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

using Tile = float[kRowTiles][kColumnTiles][4];

// The exponent of the power of two by which numbers up to `largest` are multiplied to be below
// 2^(kScaled + 1), if they are above 2^least and below 2^most.
__device__ __forceinline__ float exponent_of(float largest, float least, float most) {
  const float e = static_cast<float>(static_cast<int>(bits_as<uint32_t>(largest) >> 23) - 127);
  return kScaled - (e < least ? least : e > most ? most : e);
}

// Two numbers as two halves each.
struct TwoHalves {
  uint32_t big, small;

  __device__ __forceinline__ TwoHalves(float first, float second)
      : big(pair_of<Half>(first, second)),
        small(pair_of<Half>(first - half(big), second - half(big >> 16))) {}
  static __device__ __forceinline__ float half(uint32_t bits) {
    return to_float(Half{static_cast<uint16_t>(bits)});
  }
};

// Two neighbours in a row of a map; zeros beyond it.
__device__ __forceinline__ float2 read_pair(const Matrices& m, int map, int i, int d) {
  float x[2] = {};
  MGHF_UNROLL_ALL
  for (int k = 0; k < 2; ++k) {
    if (i < m.rows && d + k < m.columns) x[k] = m.read(map, i, d + k);
  }
  return {x[0], x[1]};
}

constexpr int kPairs = kMostDepth / 2;

// The largest magnitude of the numbers of a map that a thread looks at, infinity if any is not
// finite. Not inlined, as it is called twice.
inline __device__ MGHF_NOINLINE float largest_of_thread(Matrices m, int map, int count) {
  uint32_t most = 0;
  MGHF_UNROLL(1)
  for (int x = static_cast<int>(threadIdx.x); x < count * kPairs;
       x += static_cast<int>(blockDim.x)) {
    const float2 two = read_pair(m, map, x / kPairs, x % kPairs * 2);
    const uint32_t first = bits_as<uint32_t>(two.x) & 0x7fffffff;
    const uint32_t second = bits_as<uint32_t>(two.y) & 0x7fffffff;
    most = first > most ? first : most;
    most = second > most ? second : most;
  }
  return bits_as<float>(most < 0x7f800000 ? most : 0x7f800000);
}

// Writes `count` patches of a map, times a factor, as pairs of halves; zeros beyond the map and its
// depth. A patch's words are permuted, so that any word of eight neighbours is in eight groups of
// banks. Likewise not inlined.
inline __device__ MGHF_NOINLINE void pack_patches(uint32_t* to, Matrices m, int map, int count,
                                                  float factor) {
  promise_shared(to);
  MGHF_UNROLL(1)
  for (int x = static_cast<int>(threadIdx.x); x < count * kPairs;
       x += static_cast<int>(blockDim.x)) {
    const int i = x / kPairs, pair = x % kPairs;
    const float2 two = read_pair(m, map, i, 2 * pair);
    const TwoHalves halves(two.x * factor, two.y * factor);
    const int at = (i * kPatchWords + (pair / 4 ^ (i & 7))) * 4 + pair % 4;
    to[at] = halves.big;
    to[at + 4 * (kPatchWords / 2)] = halves.small;
  }
}

template <bool kExp>
struct ChipBlock {
  const ChipProblem& p;
  const int n, thread, threads, lane, warp, group, band, g, t;
  const int left;  // the warp's first column
  const int columns, tile_rows, rows;
  ChipState& state;
  uint4 *const keys, *const queries;              // the latter of two tiles
  float *const weights, *const dg, *const parts;  // of columns; the bands' sums of columns
  float *const exchanged, *const coefficients, *const unscale;  // of a tile's rows
  float *const of_warps;
  // Numbers of rows: the exponents a, u, the exponents of w, r, r / sum_j w, s_ii.
  float *const base, *const factor, *const top, *const share, *const scaled, *const positive;
  float *const sums;  // of each thread's columns; then the gradient's, of rows

  // Registers are too short for all that depends on the thread's number: long phases begin with an
  // object of their own, from an opaque number, in which it is computed again.
  __device__ __forceinline__ ChipBlock(const ChipProblem& p, float* shared, int thread)
      : p(p),
        n(p.n),
        thread(thread),
        threads(static_cast<int>(blockDim.x)),
        lane(thread & (kWarp - 1)),  // as the compiler does not know that it is not negative
        warp(thread >> 5),
        group(warp >> p.division.band_bits),
        band(warp & p.division.band_bits),
        g(lane >> 2),
        t(lane & 3),
        left(group * kWarpColumns),
        columns(p.division.columns),
        tile_rows(p.division.tile_rows),
        rows(p.division.rows),
        state(*reinterpret_cast<ChipState*>(shared)),
        keys(reinterpret_cast<uint4*>(shared + kFirst)),
        queries(reinterpret_cast<uint4*>(shared + p.division.queries)),
        weights(shared + p.division.weights),
        dg(shared + p.division.dg),
        parts(shared + p.division.parts),
        exchanged(shared + p.division.exchanged),
        coefficients(shared + p.division.coefficients),
        unscale(shared + p.division.unscale),
        of_warps(shared + kOfWarps),
        base(shared + p.division.base),
        factor(shared + p.division.factor),
        top(shared + p.division.top),
        share(shared + p.division.share),
        scaled(shared + p.division.scaled),
        positive(shared + p.division.positive),
        sums(shared + p.division.sums) {}

  __device__ __forceinline__ float* shared() const { return reinterpret_cast<float*>(&state); }
  __device__ __forceinline__ ChipBlock again() const {
    return ChipBlock(p, shared(), thread_again());
  }

  // Row k of the thread's in a tile.
  __device__ __forceinline__ int row_of(int tile, int k) const {
    return tile * tile_rows + band * kWarpRows + k * 8 + g;
  }
  // ---- the patches ----

  // Combines the warps' numbers. Two barriers.
  template <class Combine>
  __device__ __forceinline__ float across_warps(float x, const Combine& combine) const {
    if (lane == 0) of_warps[8 * warp] = x;
    __syncthreads();
    x = of_warps[0];
    MGHF_UNROLL(1)
    for (int w = 1; w < threads / kWarp; ++w) x = combine(x, of_warps[8 * w]);
    __syncthreads();
    return x;
  }

  // The block's queries, packed.
  __device__ __forceinline__ uint4* packed() const {
    const int block = opaque(static_cast<int>(blockIdx.x));
    return p.queries + static_cast<int64_t>(block) * rows * kPatchWords;
  }

  // Begins to copy a tile of queries, into the place of the last but one.
  __device__ __forceinline__ void copy_queries(int tile) const {
    const int words = tile_rows * kPatchWords;
    const uint4* const from = packed() + tile * words;
    uint4* const to = queries + tile % 2 * words;
    MGHF_UNROLL(1)
    for (int x = thread; x < words; x += threads) copy_async<16>(to + x, from + x);
    end_copies();
  }

  // Begins a map, whose keys it puts into shared memory. A barrier at the end.
  __device__ __forceinline__ void load(const Matrices& query, const Matrices& key, int map) const {
    const float of_query =
        across_warps(across_lanes(largest_of_thread(query, map, n), Most{}), Most{});
    const float of_key = across_warps(across_lanes(largest_of_thread(key, map, n), Most{}), Most{});
    if (thread == 0) {
      state.steps = (opaque(static_cast<int>(query.columns)) + 15) / 16;
      state.query_exponent = exponent_of(of_query, -20, 60);
      state.key_exponent = exponent_of(of_key, -20, 60);
      const float unit = scale(-state.query_exponent - state.key_exponent);
      const float factor = kExp ? 1 : unit;  // of products, which have the scale of their factors
      state.unit = unit;
      state.nothing = 50 * scale(state.query_exponent + state.key_exponent);
      const auto to_exponents = [&](float value) {
        return kExp ? value : factor_that_hides(value * unit);
      };
      state.plan = to_exponents(p.plan.value), state.plan_low = p.plan.low * factor;
      state.weight = to_exponents(p.weight.value), state.weight_low = p.weight.low * factor;
      state.contrast = p.contrast.value * unit;
      state.contrast_low = kExp ? 0 : p.contrast.low * unit;  // exponent() has no place for it
      state.linear = kExp ? state.contrast : 0;
      state.failed = !(of_query < INFINITY && of_key < INFINITY);
    }
    __syncthreads();
    uint32_t* const words = reinterpret_cast<uint32_t*>(keys);
    pack_patches(words, query, state.map, rows, scale(state.query_exponent));
    __syncthreads();
    uint4* const to = packed();
    MGHF_UNROLL(1)
    for (int x = thread; x < rows * kPatchWords; x += threads) to[x] = keys[x];
    __syncthreads();
    pack_patches(words, key, state.map, columns, scale(state.key_exponent));
    __syncthreads();
  }

  // ---- products ----

  // x = the products of the warp's rows and columns, in units of 1 / unit.
  __device__ __forceinline__ void multiply(Tile& x, int tile) const {
    MGHF_UNROLL_ALL
    for (int m = 0; m < kRowTiles; ++m) {
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumnTiles; ++c) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 4; ++i) x[m][c][i] = 0;
      }
    }
    const int turned = lane & 7;
    const int row = tile % 2 * tile_rows + band * kWarpRows + lane % 16;
    const uint4* const own = queries + row * kPatchWords;
    const uint4* const others = keys + (left + turned) * kPatchWords;
    MGHF_UNROLL(1)
    for (int step = 0; step < state.steps; ++step) {
      const uint4* const of_rows = own + ((2 * step + lane / 16) ^ turned);
      const uint4* const of_columns = others + ((2 * step + lane / 8 % 2) ^ turned);
      uint32_t big[kRowTiles][4];
      load_rows(big, of_rows);
      if (p.once) {
        add_big_products(x, big, of_columns);
      } else {
        add_products(x, big, of_rows, of_columns);
      }
    }
  }

  // A step's words of the warp's rows.
  static __device__ __forceinline__ void load_rows(uint32_t (&a)[kRowTiles][4],
                                                   const uint4* from) {
    MGHF_UNROLL_ALL
    for (int m = 0; m < kRowTiles; ++m) load_matrices(a[m], from + m * 16 * kPatchWords);
  }

  // A step's products are added to x outside the tensor cores, with rounding.
  __device__ __forceinline__ void add_products(Tile& x, const uint32_t (&big)[kRowTiles][4],
                                               const uint4* of_rows,
                                               const uint4* of_columns) const {
    uint32_t small[kRowTiles][4];
    load_rows(small, of_rows + kPatchWords / 2);
    of_columns += lane / 16 * (kPatchWords / 2);  // big, then small parts
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumnTiles; ++c) {
      uint32_t b[4];
      load_matrices(b, of_columns + c * 8 * kPatchWords);
      const uint32_t of_big[2] = {b[0], b[1]}, of_small[2] = {b[2], b[3]};
      float sum[kRowTiles][4] = {};
      MGHF_UNROLL_ALL
      for (int m = 0; m < kRowTiles; ++m) mma_pairs<Half>(sum[m], small[m], of_big);
      MGHF_UNROLL_ALL
      for (int m = 0; m < kRowTiles; ++m) mma_pairs<Half>(sum[m], big[m], of_small);
      MGHF_UNROLL_ALL
      for (int m = 0; m < kRowTiles; ++m) mma_pairs<Half>(sum[m], big[m], of_big);
      MGHF_UNROLL_ALL
      for (int m = 0; m < kRowTiles; ++m) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 4; ++i) x[m][c][i] += sum[m][i];
      }
    }
  }

  // Likewise of the big parts alone, to which the tensor cores add themselves.
  __device__ __forceinline__ void add_big_products(Tile& x, const uint32_t (&big)[kRowTiles][4],
                                                   const uint4* of_columns) const {
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumnTiles; c += 2) {
      // Two tiles of columns; the last one is alone.
      uint32_t b[4];
      load_matrices(b, of_columns + (c + 1 < kColumnTiles ? c + lane / 16 : c) * 8 * kPatchWords);
      MGHF_UNROLL_ALL
      for (int k = 0; k < 2 && c + k < kColumnTiles; ++k) {
        const uint32_t of_tile[2] = {b[2 * k], b[2 * k + 1]};
        MGHF_UNROLL_ALL
        for (int m = 0; m < kRowTiles; ++m) mma_pairs<Half>(x[m][c + k], big[m], of_tile);
      }
    }
  }

  // ---- rows ----

  // Which of the warp's entries in a tile do not count: those on the diagonal and beyond the map.
  struct Mask {
    int below, limit;  // row less column, columns left, at the thread's first entry
    bool any;

    __device__ __forceinline__ Mask(const ChipBlock& s, int tile) {
      const int first = tile * s.tile_rows + s.band * kWarpRows;
      below = first + s.g - s.left - 2 * s.t;
      limit = s.n - s.left - 2 * s.t;
      any = (first < s.left + kWarpColumns && s.left < first + kWarpRows) ||
            s.left + kWarpColumns > s.n;
    }
    __device__ __forceinline__ bool diagonal(int m, int c, int i) const {
      return below == 8 * c + i % 2 - 16 * m - 8 * (i / 2);
    }
    __device__ __forceinline__ bool outside(int c, int i) const { return 8 * c + i % 2 >= limit; }
  };

  // The number that gives an entry of x the exponent of almost nothing.
  __device__ __forceinline__ float nothing(float value) const {
    return kExp ? state.nothing : value > 0 ? -1e30f : 1e30f;
  }

  // Calls f(c) for c = 0, 1, ..., each time with tile c of eight columns in the place of the first:
  // a loop that registers allow.
  template <class F>
  __device__ __forceinline__ static void for_tiles(Tile& x, const F& f) {
    MGHF_UNROLL(1)
    for (int c = 0; c < kColumnTiles; ++c) {
      f(c);
      MGHF_UNROLL_ALL
      for (int m = 0; m < kRowTiles; ++m) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 4; ++i) {
          const float first = x[m][0][i];
          MGHF_UNROLL_ALL
          for (int k = 0; k + 1 < kColumnTiles; ++k) x[m][k][i] = x[m][k + 1][i];
          x[m][kColumnTiles - 1][i] = first;
        }
      }
    }
  }

  // Calls f(c, at) for each tile c of eight columns, which is in the place `at`; in a loop where
  // the cost makes code long.
  template <class F>
  __device__ __forceinline__ static void each_tile(Tile& x, const F& f) {
    if constexpr (kExp) {
      for_tiles(x, [&](int c) { f(c, 0); });
    } else {
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumnTiles; ++c) f(c, c);
    }
  }

  // Combines the numbers of each row of a tile: use(row of the tile, result) is called by one
  // thread for each. A barrier of the block before and after.
  template <class Combine, class Use>
  __device__ __forceinline__ void across_row(float (&x)[kRowsOfThread], const Combine& combine,
                                             const Use& use) const {
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRowsOfThread; ++k) {
      x[k] = combine(x[k], __shfl_xor_sync(~0u, x[k], 1));
      x[k] = combine(x[k], __shfl_xor_sync(~0u, x[k], 2));
      if (t == 0) exchanged[(band * kWarpRows + k * 8 + g) * kMostGroups + group] = x[k];
    }
    __syncthreads();
    if (thread < tile_rows) {
      const float* const from = exchanged + thread * kMostGroups;
      float total = from[0];
      MGHF_UNROLL(1)
      for (int w = 1; w < p.division.groups; ++w) total = combine(total, from[w]);
      use(thread, total);
    }
    __syncthreads();
  }

  __device__ __forceinline__ float rough_exponent(float x, float value, float linear) const {
    return kExp ? fmaf(score(x), value, x * linear) : x * value;
  }
  // The exponent of two of an entry less that of its row: by `value` and `low` for a unit of the
  // score, by `linear` for one of the product, which then is not the score itself.
  __device__ __forceinline__ float score(float x) const {
    return -short_exponential(x * state.unit);
  }
  __device__ __forceinline__ float exponent(float x, float value, float low, float linear,
                                            float of_row) const {
    if constexpr (kExp) {
      const float own = score(x);
      return fmaf(own, low, fmaf(own, value, fmaf(x, linear, -of_row)));
    } else {
      return fmaf(x, low, fmaf(x, value, -of_row));
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
