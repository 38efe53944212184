// A warp that solves a small map of `monce`: the map in its registers, the products, and sums over
// rows and columns. For the mathematics see monce.cu and sinkhorn_solver.h.
//
// Method. A map of at most 8 kTiles patches is kTiles x kTiles tiles of 8 x 8 entries. With g =
// lane / 4 and t = lane % 4 a lane has row g and columns 2 t and 2 t + 1 of each, as tensor cores
// leave them. All passes find them in registers. A sum over a row is one of four lanes, over a
// column one of eight: each exchange halves the number of sums that a lane has left, so that in the
// end every lane has the sum of one row and of one column, its own, of which it computes the
// inverse and whatever else is a row's or a column's. Others ask it for that.
//
// Products are three of TF32, or one for less precision. They are twice as many instructions as
// those of halves, which are few beside the others here. In return no patch needs a scale, so that
// each is read once, as float32, into shared memory of the warp's own; the order of the depths is
// any that both factors have, so that a load brings four numbers of a row; and factors of single
// numbers, not pairs, are not to be transposed for the gradient: the map's entries are where its
// product with the keys needs them.
//
// No barrier of a block, and nothing depends on which warp solves a map. Patches and columns beyond
// the map are those of other ones, finite and without weight. Registers are short in the gradient,
// of which 128 let a multiprocessor hold 16 warps, and so 2112 maps at a time.
#pragma once

#include "mma.h"
#include "monce_numbers.h"

namespace mghf::cuda {

namespace {

constexpr int kWarpsOfBlock = 4;
constexpr int kMostTiles = 4;  // of 8 patches
// Similarities in place of those that do not count, times the sign of a factor.
constexpr float kHidden = 1e34f;

struct WarpProblem {
  int n, maps, iterations;
  // Warps that make iterations again, as they have the memory for all of them; 0 if none is needed.
  int again;
  bool once;  // products are one of TF32, not three
  bool exact;  // the gradient goes through the plan
  bool fours_of_query, fours_of_key, fours_of_result;  // four neighbours in a row are one access
  KeptIterates kept;
  Factor plan, weight, contrast;  // score to exponent of K, of w without v, of e^(s / t)
  float inverse_temperature, log_weight, slope;  // as in monce.cu
  float* repeated;  // u and v of those warps' iterations, in turn

  // The queries of a map in shared memory, and as many keys: a whole tile, if there is only one.
  __host__ __device__ int patches() const { return patches_of(n); }
  __host__ __device__ int shared_of_warp() const { return numbers_of(n); }
  __host__ __device__ static int patches_of(int n) { return n > 8 ? n : 8; }
  __host__ __device__ static int numbers_of(int n) { return 2 * patches_of(n) * kMostDepth; }
};

// Where the four numbers of a patch from depth 4 `unit` on are in shared memory. They are permuted
// by row, so that neither eight lanes with two neighbouring rows and four units nor those with two
// units of four rows, every other one, meet in a bank.
__device__ __forceinline__ int place_of(int row, int unit) {
  return row * kMostDepth + (unit ^ ((row & 1) * 4 + (row / 2 & 3) * 2)) % 16 * 4;
}

// Writes `rows` patches of a map, with zeros beyond it and its depth, up to a multiple of 16
// numbers. Some are still on their way, until the thread's copies have been waited for. Not
// inlined, as it is called twice.
inline __device__ MGHF_NOINLINE void copy_patches(float* to, Matrices m, bool fours, int map,
                                                  int rows, int lane) {
  promise_shared(to);
  promise_global(m.data);
  const int n = static_cast<int>(m.rows), depth = static_cast<int>(m.columns);
  const auto copy_fours = [&](const auto& copy) {
    const int unit = lane & 15;
    if (unit >= (depth + 15) / 16 * 4) return;
    const int inside = 4 * unit < depth ? n : 0;  // rows
    const int64_t start = map * m.batch_stride + 4 * unit;
    MGHF_UNROLL(1)
    for (int row = lane >> 4; row < rows; row += 2) {
      copy(to + place_of(row, unit), row < inside, row < inside ? start + row * m.row_stride : 0);
    }
  };
  if (fours && m.element == Element::float32) {
    copy_fours([&](float* place, bool inside, int64_t from) {
      copy_async<16>(place, static_cast<const float*>(m.data) + from, inside ? 16 : 0);
    });
  } else if (fours) {
    copy_fours([&](float* place, bool inside, int64_t from) {
      const Half* const halves = static_cast<const Half*>(m.data) + from;
      float four[4];
      if (m.element == Element::float16) {
        load_four(four, halves);
      } else {
        load_four(four, reinterpret_cast<const BFloat16*>(halves));
      }
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) four[i] = inside ? four[i] : 0;
      store_four(place, four);
    });
  } else {
    MGHF_UNROLL(1)
    for (int x = lane; x < rows * kMostDepth; x += kWarp) {
      const int row = x / kMostDepth, d = x % kMostDepth;
      const float number = row < n && d < depth ? m.read(map, row, d) : 0;
      to[place_of(row, d / 4) + d % 4] = number;
    }
  }
}

// Combines kCount numbers each of lanes whose numbers differ in the bits from kFirst down to kLast.
// A lane ends with one result, whose index is in its upper bits of those.
template <int kFirst, int kLast, int kCount, class Combine>
__device__ __forceinline__ float exchange(float (&x)[kCount], int lane, const Combine& combine) {
  int left = kCount;
  MGHF_UNROLL_ALL
  for (int mask = kFirst; mask >= kLast; mask /= 2) {
    const bool upper = (lane & mask) != 0;
    if (left > 1) {
      left /= 2;
      MGHF_UNROLL_ALL
      for (int k = 0; k < left; ++k) {
        const float sent = upper ? x[k] : x[k + left];
        const float own = upper ? x[k + left] : x[k];
        x[k] = combine(own, __shfl_xor_sync(kAllLanes, sent, mask));
      }
    } else {
      x[0] = combine(x[0], __shfl_xor_sync(kAllLanes, x[0], mask));
    }
  }
  return x[0];
}

// An integer whose order is that of the numbers, and back.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return bits ^ (bits >> 31 != 0 ? ~0u : 1u << 31);
}
__device__ __forceinline__ float from_ordered(uint32_t x) {
  return bits_as<float>(x ^ (x >> 31 != 0 ? 1u << 31 : ~0u));
}
// A number that all lanes have; the compiler knows that they do.
__device__ __forceinline__ int uniform(int x) {
  return static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(x)));
}
// The largest of the lanes' numbers less the smallest, NaN if any is; of those that count.
__device__ __forceinline__ float spread_of_lanes(float x, bool counts) {
  const uint32_t own = ordered(x);
  const uint32_t most = __reduce_max_sync(kAllLanes, counts ? own : 0u);
  const uint32_t least = __reduce_min_sync(kAllLanes, counts ? own : ~0u);
  return from_ordered(most) - from_ordered(least);
}

template <int kTiles>
struct WarpMap {
  static constexpr int kRows = kTiles, kColumns = 2 * kTiles;  // of a lane
  static constexpr int kRowTiles = (kTiles + 1) / 2;           // of the tensor cores: 16 rows
  using Entries = float[kRows][kColumns];
  using OfRows = float[kRows];
  using OfColumns = float[kColumns];

  const WarpProblem& p;
  const int n, map, lane, g, t;
  float *const queries, *const keys;  // in shared memory

  __device__ __forceinline__ WarpMap(const WarpProblem& p, float* shared, int map, int lane)
      : p(p),
        n(p.n),
        map(map),
        lane(lane),
        g(lane >> 2),
        t(lane & 3),
        queries(shared),
        keys(shared + p.patches() * kMostDepth) {}

  // Computes what depends on the lane again, because registers are short.
  __device__ __forceinline__ WarpMap again() const {
    return WarpMap(p, queries, map, opaque(lane));
  }

  // ---- the lane's own row and column; where there are fewer than lanes, several have the same
  // ----

  __device__ __forceinline__ int row() const { return t / (4 / kRows) * 8 + g; }
  __device__ __forceinline__ int column() const {
    const int k = g / (8 / kColumns);
    return k / 2 * 8 + 2 * t + k % 2;
  }
  __device__ __forceinline__ bool has_row() const { return row() < n; }
  __device__ __forceinline__ bool has_column() const { return column() < n; }
  // Whether no lane before it has the same.
  __device__ __forceinline__ bool writes_row() const {
    return has_row() && t % (4 / kRows) == 0;
  }
  __device__ __forceinline__ bool writes_column() const {
    return has_column() && g % (8 / kColumns) == 0;
  }

  // The sums, or maxima, of all rows from the lanes' parts, of which each lane gets its own row's.
  template <class Combine>
  __device__ __forceinline__ float across_rows(OfRows& x, const Combine& combine) const {
    return exchange<2, 1>(x, lane, combine);
  }
  __device__ __forceinline__ float sum_of_column(OfColumns& x) const {
    return exchange<16, 4>(x, lane, Add{});
  }
  // What the lanes have for their own rows or columns.
  __device__ __forceinline__ void of_rows(OfRows& to, float own) const {
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      to[k] = kRows == 1 ? own : __shfl_sync(kAllLanes, own, (lane & ~3) + k * (4 / kRows));
    }
  }
  __device__ __forceinline__ void of_columns(OfColumns& to, float own) const {
    MGHF_UNROLL_ALL
    for (int k = 0; k < kColumns; ++k) {
      to[k] = __shfl_sync(kAllLanes, own, k * (8 / kColumns) * 4 + t);
    }
  }

  // ---- products ----

  // Reads the map's patches, after the warp has read what was in their place.
  __device__ __forceinline__ void load(const Matrices& query, const Matrices& key) const {
    __syncwarp();
    copy_patches(queries, query, p.fours_of_query, map, p.patches(), lane);
    copy_patches(keys, key, p.fours_of_key, map, p.patches(), lane);
    end_copies();
    wait_for_copies<0>();
    __syncwarp();
  }

  // Patch r of a tile; that of the first one if there is none, whose products then do not count.
  __device__ __forceinline__ int patch(int tile, int r) const {
    const bool whole = kTiles == 1 || tile < kTiles / 2;  // as the map is not one of fewer tiles
    return (whole || 8 * tile + r < n ? 8 * tile : 0) + r;
  }

  // x = the similarities. The products of 16 of the depth are added up by the tensor cores, which
  // truncate; these sums are added outside, with rounding. A lane's four numbers of a row are two
  // steps of the tensor cores.
  __device__ __forceinline__ void multiply(Entries& x, int depth) const {
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) x[k][c] = 0;
    }
    MGHF_UNROLL(1)
    for (int start = 0; start < depth; start += 16) {
      const int unit = start / 4 + t;
      float of_query[kRows][4], of_key[kRows][4];
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) {
        load_four(of_query[k], queries + place_of(patch(k, g), unit));
        load_four(of_key[k], keys + place_of(patch(k, g), unit));
      }
      SplitA a[2][kRowTiles];
      MGHF_UNROLL_ALL
      for (int step = 0; step < 2; ++step) {
        MGHF_UNROLL_ALL
        for (int m = 0; m < kRowTiles; ++m) {
          MGHF_UNROLL_ALL
          for (int i = 0; i < 4; ++i) {
            const int k = 2 * m + i % 2;
            const SplitTf32 split(k < kRows ? of_query[k < kRows ? k : 0][2 * step + i / 2] : 0);
            a[step][m].big[i] = split.big, a[step][m].small[i] = split.small;
          }
        }
      }
      MGHF_UNROLL_ALL
      for (int c = 0; c < kTiles; ++c) {
        SplitB b[2];
        MGHF_UNROLL_ALL
        for (int i = 0; i < 4; ++i) {
          const SplitTf32 split(of_key[c][i]);
          b[i / 2].big[i % 2] = split.big, b[i / 2].small[i % 2] = split.small;
        }
        float sum[kRowTiles][4] = {};
        const auto add = [&](bool small_a, bool small_b) {
          MGHF_UNROLL_ALL
          for (int step = 0; step < 2; ++step) {
            MGHF_UNROLL_ALL
            for (int m = 0; m < kRowTiles; ++m) {
              mma_tf32(sum[m], small_a ? a[step][m].small : a[step][m].big,
                       small_b ? b[step].small : b[step].big);
            }
          }
        };
        if (!p.once) {
          add(true, false);
          add(false, true);
        }
        add(false, false);
        MGHF_UNROLL_ALL
        for (int k = 0; k < kRows; ++k) {
          MGHF_UNROLL_ALL
          for (int i = 0; i < 2; ++i) x[k][2 * c + i] += sum[k / 2][k % 2 * 2 + i];
        }
      }
    }
  }

  // Hides the entries that do not count from a factor of that sign: those of the diagonal, and the
  // columns beyond the map. Returns s_ii of the lane's own row.
  __device__ __forceinline__ float hide(Entries& x, float sign) const {
    const float hidden = sign > 0 ? -kHidden : kHidden;
    const int from_first = g - 2 * t;  // the diagonal's column less the lane's first one
    float positive = 0;
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      // The lane that has the row's entry of the diagonal.
      const float entry =
          __shfl_sync(kAllLanes, from_first == 0 ? x[k][2 * k] : x[k][2 * k + 1],
                      (lane & ~3) + g / 2);
      if (k * 8 + g == row()) positive = entry;
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        if (from_first == i) x[k][2 * k + i] = hidden;
      }
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) {
        if (c / 2 * 8 + 2 * t + c % 2 >= n) x[k][c] = hidden;
      }
    }
    return positive;
  }
  // Hides them from a factor of the other sign.
  __device__ __forceinline__ static void hide_from_other_sign(Entries& x) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) {
        if (fabsf(x[k][c]) == kHidden) x[k][c] = -x[k][c];
      }
    }
  }

  // ---- powers ----

  // The rounded maximum of each row's exponents; of the lane's own row.
  __device__ __forceinline__ float top_of_row(const Entries& x, const Factor& factor) const {
    OfRows most;
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      most[k] = -INFINITY;
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) most[k] = fmaxf(most[k], x[k][c] * factor.value);
    }
    const float top = across_rows(most, Most{});
    return fabsf(top) < kLargestExponent ? round_to_integer(top) : top;
  }
  // 2^(factor x - top); 0 where x is hidden.
  __device__ __forceinline__ void take_powers(Entries& to, const Entries& x, const Factor& factor,
                                              float own_top) const {
    OfRows top;
    of_rows(top, own_top);
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) {
        const float exponent = fmaf(x[k][c], factor.value, -top[k]);
        to[k][c] = power_of(fmaf(x[k][c], factor.low, exponent));
      }
    }
  }
  // sum_j x_ij weight_j of the lane's own row, and sum_i weight_i x_ij of its own column.
  __device__ __forceinline__ float weighted_row(const Entries& x, const OfColumns& weight) const {
    OfRows sum;
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRows; ++k) {
      sum[k] = 0;
      MGHF_UNROLL_ALL
      for (int c = 0; c < kColumns; ++c) sum[k] += x[k][c] * weight[c];
    }
    return across_rows(sum, Add{});
  }
  __device__ __forceinline__ float weighted_column(const Entries& x, const OfRows& weight) const {
    OfColumns sum;
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumns; ++c) {
      sum[c] = 0;
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) sum[c] += weight[k] * x[k][c];
    }
    return sum_of_column(sum);
  }

  // ---- the gradient ----

  // Writes ds times the keys, 16 of the depth at a time. A lane reads two neighbours of two keys,
  // which are factors of two products, and gets four neighbours of each of its rows.
  __device__ __forceinline__ void multiply_by_keys(const Entries& ds, int depth,
                                                   void* result) const {
    MGHF_UNROLL(1)
    for (int start = 0; start < depth; start += 16) {
      const int unit = start / 4 + g / 2;
      float sum[2][kRowTiles][4] = {};
      MGHF_UNROLL_ALL
      for (int c = 0; c < kRows; ++c) {
        SplitA a[kRowTiles];
        MGHF_UNROLL_ALL
        for (int m = 0; m < kRowTiles; ++m) {
          MGHF_UNROLL_ALL
          for (int i = 0; i < 4; ++i) {
            const int k = 2 * m + i % 2;
            const float entry = k < kRows ? ds[k < kRows ? k : 0][2 * c + i / 2] : 0;
            // Split again for each part of the depth, because registers are short.
            const SplitTf32 split(bits_as<float>(opaque(bits_as<uint32_t>(entry))));
            a[m].big[i] = split.big, a[m].small[i] = split.small;
          }
        }
        SplitB b[2];
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          const float* const place = keys + place_of(patch(c, 2 * t + i), unit) + g % 2 * 2;
          const float2 two = reinterpret_cast<const float2&>(*place);
          MGHF_UNROLL_ALL
          for (int q = 0; q < 2; ++q) {
            const SplitTf32 split(q == 0 ? two.x : two.y);
            b[q].big[i] = split.big, b[q].small[i] = split.small;
          }
        }
        const auto add = [&](bool small_a, bool small_b) {
          MGHF_UNROLL_ALL
          for (int q = 0; q < 2; ++q) {
            MGHF_UNROLL_ALL
            for (int m = 0; m < kRowTiles; ++m) {
              mma_tf32(sum[q][m], small_a ? a[m].small : a[m].big,
                       small_b ? b[q].small : b[q].big);
            }
          }
        };
        if (!p.once) {
          add(true, false);
          add(false, true);
        }
        add(false, false);
      }
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRows; ++k) {
        const int row = 8 * k + g;
        if (row >= n) continue;
        float four[4];
        MGHF_UNROLL_ALL
        for (int i = 0; i < 4; ++i) four[i] = sum[i % 2][k / 2][k % 2 * 2 + i / 2];
        write_four(result, depth, row, start + 4 * t, four);
      }
    }
  }

  // Writes four neighbours in a row of the gradient; in the queries' place, if they are not one
  // access.
  __device__ __forceinline__ void write_four(void* result, int depth, int row, int d,
                                             const float (&x)[4]) const {
    if (p.fours_of_result) {
      promise_global(result);
      const int64_t place = (int64_t{map} * n + row) * depth + d;
      if (d < depth) store_four(static_cast<float*>(result) + place, x);
    } else {
      store_four(queries + place_of(row, d / 4), x);
    }
  }

  // Writes the gradient from there.
  __device__ __forceinline__ void write_staged(void* result, const Matrices& query) const {
    __syncwarp();
    const int depth = static_cast<int>(query.columns);
    const int64_t start = int64_t{map} * n * depth;
    MGHF_UNROLL(1)
    for (int row = 0; row < n; ++row) {
      MGHF_UNROLL(1)
      for (int d = lane; d < depth; d += kWarp) {
        write_element(query.element, result, start + row * depth + d,
                      queries[place_of(row, d / 4) + d % 4]);
      }
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
