// The last pass of the gradient of `monce` on chip: ds of a tile of rows in registers, then times
// the keys. See monce_chip_block.h.
#pragma once

#include "monce_chip_block.h"

namespace mghf::cuda {

namespace {

// The terms of the gradient through the plan, sum_t u_i c_tj + r_ti v_j, in device memory: for each
// term c and v of the columns in turn, then u and r of the rows.
struct ChipTerms {
  float* numbers;
  int columns, rows;

  __host__ __device__ static int64_t floats(const ChipDivision& division, int64_t terms) {
    return 2 * terms * (division.columns + division.rows);
  }
  // Those of a block that makes iterations again, which it keeps.
  __host__ __device__ static int64_t repeated_floats(const ChipDivision& division, int64_t n,
                                                     int64_t iterations) {
    return floats(division, iterations + 1) + (2 * iterations * n + 3) / 4 * 4;
  }
  __device__ __forceinline__ float2& column(int term, int j) const {
    return reinterpret_cast<float2*>(numbers)[int64_t{term} * (columns + rows) + j];
  }
  __device__ __forceinline__ float2& row(int term, int i) const {
    return column(term, columns + i);
  }
};

// ds of the tile's entries in place of the similarities.
template <bool kExp>
__device__ __forceinline__ void differentiate(const ChipBlock<kExp>& s, Tile& x, int tile) {
  const ChipProblem& p = s.p;
  const ChipState& state = s.state;
  const ChipTerms terms{state.terms, s.columns, s.rows};
  promise_global(terms.numbers);
  const typename ChipBlock<kExp>::Mask mask(s, tile);
  s.for_tiles(x, [&](int c) {
    const int j = s.left + 8 * c + 2 * s.t;
    float through[kRowTiles][4] = {};
    MGHF_UNROLL(1)
    for (int term = state.first_term; term <= state.last_term; ++term) {
      const float4 column = reinterpret_cast<const float4&>(terms.column(term, j));
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRowsOfThread; ++k) {
        const float2 row = terms.row(term, s.row_of(tile, k));
        float* const to = through[k / 2] + k % 2 * 2;
        to[0] += row.x * column.x + row.y * column.y;
        to[1] += row.x * column.z + row.y * column.w;
      }
    }
    const float2 w = reinterpret_cast<const float2&>(s.weights[j]);
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRowsOfThread; ++k) {
      const int row = s.row_of(tile, k);
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        float& entry = x[k / 2][0][k % 2 * 2 + i];
        // Finite beyond the map, where the weight is 0.
        const float exponent = fminf(
            s.exponent(entry, state.weight, state.weight_low, state.linear, s.top[row]), 126.0f);
        float d = power_of(exponent) * (i == 0 ? w.x : w.y) * s.scaled[row];
        if (p.exact) {
          const float own = power_of(s.exponent(entry, state.plan, state.plan_low, 0, s.base[row]));
          float slope = p.slope;
          if constexpr (kExp) slope *= s.score(entry);
          d = d * p.inverse_temperature + (d - own * through[k / 2][k % 2 * 2 + i]) * slope;
        } else {
          d *= p.inverse_temperature;
        }
        entry = mask.diagonal(k / 2, c, k % 2 * 2 + i) ? -s.share[row] * p.inverse_temperature : d;
      }
    }
  });
}

// Pairs of neighbouring columns of a tile, as halves in the rows' scale.
struct PackedTile {
  uint32_t big[kRowTiles][kColumnTiles][2], small[kRowTiles][kColumnTiles][2];
};
constexpr int kHalfWords = kHalfDepth / 8;

// The rows' scale, by the largest of each.
template <bool kExp>
__device__ __forceinline__ void pack_tile(const ChipBlock<kExp>& s, const Tile& x,
                                          PackedTile& packed) {
  float most[kRowsOfThread] = {};
  MGHF_UNROLL_ALL
  for (int m = 0; m < kRowTiles; ++m) {
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumnTiles; ++c) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        most[2 * m + i / 2] = fmaxf(most[2 * m + i / 2], fabsf(x[m][c][i]));
      }
    }
  }
  s.across_row(most, Most{}, [&](int r, float of_row) {
    const float exponent = exponent_of(of_row, -100, 100);
    s.coefficients[r] = scale(exponent);
    s.unscale[r] = scale(-exponent);
  });
  MGHF_UNROLL_ALL
  for (int k = 0; k < kRowsOfThread; ++k) {
    const float factor = s.coefficients[s.band * kWarpRows + k * 8 + s.g];
    MGHF_UNROLL_ALL
    for (int c = 0; c < kColumnTiles; ++c) {
      const float* const two = x[k / 2][c] + k % 2 * 2;
      const TwoHalves halves(two[0] * factor, two[1] * factor);
      packed.big[k / 2][c][k % 2] = halves.big;
      packed.small[k / 2][c][k % 2] = halves.small;
    }
  }
}

// sum = the warp's part of the tile times the keys, for half of the depth.
template <bool kExp>
__device__ __forceinline__ void multiply_packed(const ChipBlock<kExp>& s, const PackedTile& packed,
                                                int start,
                                                float (&sum)[kRowTiles][kHalfWords][4]) {
  const int turned = s.lane & 7;
  const uint4* const from =
      s.keys + (s.left + turned) * kPatchWords + s.lane / 16 * (kPatchWords / 2);
  MGHF_UNROLL_ALL
  for (int two = 0; two < kColumnTiles; two += 2) {
    const bool single = two + 1 == kColumnTiles;  // there is no second tile of eight columns
    uint32_t big[kRowTiles][4], small[kRowTiles][4];
    MGHF_UNROLL_ALL
    for (int m = 0; m < kRowTiles; ++m) {
      MGHF_UNROLL_ALL
      for (int a = 0; a < 4; ++a) {
        const int c = single ? two : two + a / 2;
        big[m][a] = single && a / 2 == 1 ? 0 : packed.big[m][c][a % 2];
        small[m][a] = single && a / 2 == 1 ? 0 : packed.small[m][c][a % 2];
      }
    }
    const int row = 8 * two + (single ? 0 : s.lane / 8 % 2 * 8);
    MGHF_UNROLL_ALL
    for (int w = 0; w < kHalfWords; ++w) {
      uint32_t b[4];
      load_transposed(b, from + row * kPatchWords + ((start / 8 + w) ^ turned));
      s.add(sum, w, big, small, b);
    }
  }
}

// Adds up the groups' sums, four at once. A barrier of the block at the end.
template <bool kExp>
__device__ __forceinline__ void join_groups(const ChipBlock<kExp>& s,
                                            const float (&sum)[kRowTiles][kHalfWords][4]) {
  MGHF_UNROLL(1)
  for (int first = 0; first < s.p.division.groups; first += kSums) {
    if (s.group / kSums == first / kSums) {
      float* const to = s.sums + 2 * s.t +
                        (s.group % kSums * s.tile_rows + s.band * kWarpRows + s.g) * kSumPitch;
      MGHF_UNROLL_ALL
      for (int k = 0; k < kRowsOfThread; ++k) {
        MGHF_UNROLL_ALL
        for (int w = 0; w < kHalfWords; ++w) {
          float2& at = reinterpret_cast<float2&>(to[k * 8 * kSumPitch + 8 * w]);
          const float* const own = sum[k / 2][w] + k % 2 * 2;
          const float2 before = first == 0 ? float2{0, 0} : at;
          at = {before.x + own[0], before.y + own[1]};
        }
      }
    }
    __syncthreads();
  }
}

// Writes half of the depth of a tile's rows, from the groups' sums.
template <bool kExp>
__device__ __forceinline__ void write_rows(const ChipBlock<kExp>& s, int tile, int start,
                                           const Matrices& key, void* result) {
  const int depth = static_cast<int>(key.columns);
  const int groups = s.p.division.groups < kSums ? s.p.division.groups : kSums;
  MGHF_UNROLL(1)
  for (int e = s.thread; e < s.tile_rows * kHalfDepth; e += s.threads) {
    const int r = e / kHalfDepth, d = start + e % kHalfDepth, i = tile * s.tile_rows + r;
    if (i >= s.n || d >= depth) continue;
    const float* const from = s.sums + r * kSumPitch + e % kHalfDepth;
    float total = from[0];
    MGHF_UNROLL(1)
    for (int of = 1; of < groups; ++of) total += from[of * s.tile_rows * kSumPitch];
    total *= s.unscale[r] * scale(-s.state.key_exponent);
    const int64_t place = (static_cast<int64_t>(s.state.map) * s.n + i) * depth + d;
    with_element(key.element, [&](auto element) {
      using T = decltype(element);
      static_cast<T*>(result)[place] = from_float<T>(total);
    });
  }
}

template <bool kExp>
__device__ __forceinline__ void write_gradient(const ChipBlock<kExp>& s, const Matrices& key,
                                               void* result) {
  s.copy_queries(0);
  wait_for_copies<0>();
  __syncthreads();
  MGHF_UNROLL(1)
  for (int tile = 0; tile < s.p.division.tiles; ++tile) {
    if (tile + 1 < s.p.division.tiles) s.copy_queries(tile + 1);
    Tile x;
    s.again().multiply(x, tile);
    differentiate(s.again(), x, tile);
    wait_for_copies<0>();
    PackedTile packed;
    pack_tile(s.again(), x, packed);
    MGHF_UNROLL(1)
    for (int start = 0; start < static_cast<int>(key.columns); start += kHalfDepth) {
      float sum[kRowTiles][kHalfWords][4] = {};
      multiply_packed(s.again(), packed, start, sum);
      join_groups(s.again(), sum);
      write_rows(s.again(), tile, start, key, result);
      __syncthreads();
    }
  }
}

}  // namespace

}  // namespace mghf::cuda
