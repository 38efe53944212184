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

// ds of the tile's entries in place of the similarities. `most` becomes the largest of each row.
template <bool kExp>
__device__ __forceinline__ void differentiate(const ChipBlock<kExp>& s, Tile& x, int tile,
                                              float (&most)[kRowsOfThread]) {
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
        // Finite beyond the map, where both are multiplied by 0.
        const auto power = [&](float value, float low, float linear, float of_row) {
          return power_of(fminf(s.exponent(entry, value, low, linear, of_row), 126.0f));
        };
        const float weight = power(state.weight, state.weight_low, state.linear, s.top[row]);
        const float own = power(state.plan, state.plan_low, 0, s.base[row]);
        const float share = weight * (i == 0 ? w.x : w.y) * s.scaled[row];
        const float slope = kExp ? p.slope * s.score(entry) : p.slope;
        const float d = share * p.inverse_temperature +
                        (share - own * through[k / 2][k % 2 * 2 + i]) * slope;
        entry = mask.diagonal(k / 2, c, k % 2 * 2 + i) ? -s.share[row] * p.inverse_temperature : d;
        most[k] = fmaxf(most[k], fabsf(entry));
      }
    }
  });
}

// Pairs of neighbouring columns of a tile become halves in the rows' scale, by the largest of each:
// the big parts of a thread's upper and lower row, then the small ones, as bits.
template <bool kExp>
__device__ __forceinline__ void pack_tile(const ChipBlock<kExp>& s, Tile& x,
                                          float (&most)[kRowsOfThread]) {
  s.across_row(most, Most{}, [&](int r, float of_row) {
    const float exponent = exponent_of(of_row, -100, 100);
    s.coefficients[r] = scale(exponent);
    s.unscale[r] = scale(-exponent);
  });
  float factor[kRowsOfThread];
  MGHF_UNROLL_ALL
  for (int k = 0; k < kRowsOfThread; ++k) {
    factor[k] = s.coefficients[s.band * kWarpRows + k * 8 + s.g];
  }
  s.each_tile(x, [&](int, int at) {
    MGHF_UNROLL_ALL
    for (int m = 0; m < kRowTiles; ++m) {
      float (&four)[4] = x[m][at];
      const TwoHalves upper(four[0] * factor[2 * m], four[1] * factor[2 * m]);
      const TwoHalves lower(four[2] * factor[2 * m + 1], four[3] * factor[2 * m + 1]);
      four[0] = bits_as<float>(upper.big), four[1] = bits_as<float>(lower.big);
      four[2] = bits_as<float>(upper.small), four[3] = bits_as<float>(lower.small);
    }
  });
}

// A group's sums of a part of the depth for a tile's row. Groups of eight are permuted by row, so
// that banks differ.
template <bool kExp>
__device__ __forceinline__ float* part_of(const ChipBlock<kExp>& s, int group, int r, int d) {
  return s.sums + (group * s.tile_rows + r) * kPartDepth + (d ^ (r / 2 & 1) * 8);
}

// Writes the warp's part of the tile times the keys, for a part of the depth.
template <bool kExp>
__device__ __forceinline__ void multiply_packed(const ChipBlock<kExp>& s, const Tile& packed,
                                                int start) {
  constexpr int kPairs = (kColumnTiles + 1) / 2;  // of tiles of eight columns; the last is single
  const int turned = s.lane & 7;
  const uint4* const from =
      s.keys + (s.left + turned) * kPatchWords + s.lane / 16 * (kPatchWords / 2);
  MGHF_UNROLL(1)
  for (int d = 0; d < kPartDepth; d += 8) {
    float sum[kRowTiles][4] = {};
    MGHF_UNROLL_ALL
    for (int pair = 0; pair < kPairs; ++pair) {
      const bool single = 2 * pair + 1 == kColumnTiles;
      const int row = 16 * pair + (single ? 0 : s.lane / 8 % 2 * 8);
      uint32_t b[4];
      load_transposed(b, from + row * kPatchWords + ((start + d) / 8 ^ turned));
      // By the big (0) or small (1) parts of the tile and of the keys.
      const auto add = [&](int of_tile, int of_keys) {
        const uint32_t keys[2] = {b[2 * of_keys], b[2 * of_keys + 1]};
        MGHF_UNROLL_ALL
        for (int m = 0; m < kRowTiles; ++m) {
          uint32_t factor[4];
          MGHF_UNROLL_ALL
          for (int a = 0; a < 4; ++a) {
            const float(&four)[4] = packed[m][2 * pair + (single ? 0 : a / 2)];
            factor[a] = single && a / 2 == 1 ? 0 : bits_as<uint32_t>(four[2 * of_tile + a % 2]);
          }
          mma_pairs<Half>(sum[m], factor, keys);
        }
      };
      if (!s.p.once) {
        add(1, 0);
        add(0, 1);
      }
      add(0, 0);
    }
    MGHF_UNROLL_ALL
    for (int k = 0; k < kRowsOfThread; ++k) {
      float* const to =
          part_of(s, s.group, s.band * kWarpRows + k * 8 + s.g, d + 2 * s.t);
      const float* const two = sum[k / 2] + k % 2 * 2;
      reinterpret_cast<float2&>(*to) = {two[0], two[1]};
    }
  }
}

// Writes a part of the depth of a tile's rows, from the groups' sums.
template <bool kExp>
__device__ __forceinline__ void write_rows(const ChipBlock<kExp>& s, int tile, int start,
                                           const Matrices& key, void* result) {
  const int depth = static_cast<int>(key.columns), first = tile * s.tile_rows;
  const int64_t place = (static_cast<int64_t>(s.state.map) * s.n + first) * depth + start;
  const float unscale = scale(-s.state.key_exponent);
  MGHF_UNROLL(1)
  for (int e = s.thread; e < s.tile_rows * kPartDepth; e += s.threads) {
    const int r = e / kPartDepth, d = e % kPartDepth;
    if (first + r >= s.n || start + d >= depth) continue;
    float total = 0;
    MGHF_UNROLL(1)
    for (int group = 0; group < s.p.division.groups; ++group) total += *part_of(s, group, r, d);
    write_element(key.element, result, place + r * depth + d, total * (s.unscale[r] * unscale));
  }
}

// Writes the gradient of a tile's queries, from its similarities.
template <bool kExp>
__device__ __forceinline__ void write_gradient(const ChipBlock<kExp>& s, Tile& x, int tile,
                                               const Matrices& key, void* result) {
  float most[kRowsOfThread] = {};
  differentiate(s.again(), x, tile, most);
  wait_for_copies<0>();
  pack_tile(s.again(), x, most);
  MGHF_UNROLL(1)
  for (int start = 0; start < static_cast<int>(key.columns); start += kPartDepth) {
    multiply_packed(s.again(), x, start);
    __syncthreads();
    write_rows(s.again(), tile, start, key, result);
    __syncthreads();
  }
}

}  // namespace

}  // namespace mghf::cuda
