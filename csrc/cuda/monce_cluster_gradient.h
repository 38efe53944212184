// The last pass of the gradient of `monce` by a cluster: ds of a tile of rows in registers, then
// times the keys. See monce_cluster_block.h.
#pragma once

#include "monce_cluster_block.h"

namespace mghf::cuda {

namespace {

__device__ __forceinline__ ClusterTerms terms_of(const ClusterBlock& s) {
  float* const numbers = s.state().terms;
  promise_global(numbers);
  return {numbers, s.p.division.all_columns(), s.p.division.rows};
}

// ds of the tile's entries in place of the similarities.
__device__ __forceinline__ void differentiate(const ClusterBlock& s, Products112& x, int tile) {
  const ClusterProblem& p = s.p;
  const ClusterState& state = s.state();
  const ClusterTerms terms = terms_of(s);
  const int row = s.warp_row(tile) + s.g, own = s.above(tile);
  const float weight = state.weight, weight_low = state.weight_low;
  const float plan = state.plan, plan_low = state.plan_low;
  float top[2], base[2], scaled[2], diagonal[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    const int i = row + 8 * half;
    top[half] = s.top(i), base[half] = s.base(i), scaled[half] = s.scaled(i);
    diagonal[half] = -s.share(i) * p.inverse_temperature;
  }
  // Two tiles of columns at a time, for fewer waits for loads, in a loop that turns the registers.
  MGHF_UNROLL(1)
  for (int two = 0; two < kPartTiles; two += 2) {
    const int column = s.left() + 8 * two;
    float through[2][2][2] = {};
    MGHF_UNROLL(1)
    for (int term = state.first_term; term <= state.last_term; ++term) {
      const float2* const of_columns = terms.of_columns(term) + s.first + column;
      float4 of_column[2];
      float2 of_row[2];
      MGHF_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        of_column[k] = reinterpret_cast<const float4&>(of_columns[8 * k]);
        of_row[k] = terms.of_rows(term)[row + 8 * k];
      }
      MGHF_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        MGHF_UNROLL_ALL
        for (int half = 0; half < 2; ++half) {
          float(&to)[2] = through[k][half];
          to[0] += of_row[half].x * of_column[k].x + of_row[half].y * of_column[k].y;
          to[1] += of_row[half].x * of_column[k].z + of_row[half].y * of_column[k].w;
        }
      }
    }
    MGHF_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const float2 w = reinterpret_cast<const float2&>(s.weights()[column + 8 * k]);
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          float& entry = x[4 * k + 2 * half + i];
          // Finite beyond the map, where the weight is 0.
          const float exponent =
              fminf(fmaf(entry, weight_low, fmaf(entry, weight, -top[half])), 126.0f);
          const float share = power_of(exponent) * (i == 0 ? w.x : w.y) * scaled[half];
          const float of_plan =
              power_of(fminf(fmaf(entry, plan_low, fmaf(entry, plan, -base[half])), 126.0f));
          const float d =
              share * p.inverse_temperature + (share - of_plan * through[k][half][i]) * p.slope;
          entry = own - 8 * two == ClusterBlock::below(half, k, i) ? diagonal[half] : d;
        }
      }
    }
    float first[8];
    MGHF_UNROLL_ALL
    for (int k = 0; k < 8; ++k) first[k] = x[k];
    MGHF_UNROLL_ALL
    for (int k = 0; k + 8 < kPartColumns / 2; ++k) x[k] = x[k + 8];
    MGHF_UNROLL_ALL
    for (int k = 0; k < 8; ++k) x[kPartColumns / 2 - 8 + k] = first[k];
  }
}

// Pairs of neighbouring columns as halves in the rows' scale: of each tile of 8 columns the first
// row's and the second's.
struct PackedEntries {
  uint32_t big[kPartTiles][2], small[kPartTiles][2];
  float back[2];  // undoes the scale

  __device__ __forceinline__ explicit PackedEntries(const Products112& x) {
    float most[2] = {};
    MGHF_UNROLL_ALL
    for (int k = 0; k < kPartColumns / 2; ++k) {
      most[k / 2 % 2] = fmaxf(most[k / 2 % 2], fabsf(x[k]));
    }
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 1));
      most[half] = fmaxf(most[half], __shfl_xor_sync(~0u, most[half], 2));
      const PowerOfTwo scale(most[half]);
      back[half] = scale.back;
      MGHF_UNROLL_ALL
      for (int c = 0; c < kPartTiles; ++c) {
        const float* const pair = x + 4 * c + 2 * half;
        const SplitHalves halves(pair[0] * scale.by, pair[1] * scale.by);
        big[c][half] = halves.big, small[c][half] = halves.small;
      }
    }
  }
};

using DepthSums = float[kSumDepth / 8][4];

// sum = the warp's part of the tile times the keys, for some of the depth, in the rows' scale and
// that of the keys.
__device__ __forceinline__ void multiply_by_keys(const ClusterBlock& s, const PackedEntries& x,
                                                 int start, DepthSums& sum) {
  // The thread's row of one of four cores: of two tiles of columns the big parts, then the small
  // ones.
  const unsigned char* const from = s.keys() + s.lane / 16 * kKeyBytes +
                                    s.part * 2 * kKeyBytes + s.lane / 8 % 2 * kEightPatches +
                                    start / 8 * kCore + s.lane % 8 * 16;
  DepthSums low = {};  // of small products: tensor cores truncate a sum each time they add to it
  MGHF_UNROLL_ALL
  for (int two = 0; two < kPartTiles; two += 2) {
    uint32_t big[4], small[4];
    MGHF_UNROLL_ALL
    for (int a = 0; a < 4; ++a) {
      big[a] = x.big[two + a / 2][a % 2], small[a] = x.small[two + a / 2][a % 2];
    }
    MGHF_UNROLL_ALL
    for (int eight = 0; eight < kSumDepth / 8; ++eight) {
      uint32_t b[4];
      load_transposed(
          b, reinterpret_cast<const uint4*>(from + two * kEightPatches + eight * kCore));
      const uint32_t of_big[2] = {b[0], b[1]}, of_small[2] = {b[2], b[3]};
      if (!s.p.once_by_keys) {
        mma_pairs<Half>(low[eight], small, of_big);
        mma_pairs<Half>(low[eight], big, of_small);
      }
      mma_pairs<Half>(sum[eight], big, of_big);
    }
  }
  MGHF_UNROLL_ALL
  for (int eight = 0; eight < kSumDepth / 8; ++eight) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) sum[eight][i] += low[eight][i];
  }
}

// Where the block's sums for some of the depth are.
__device__ __forceinline__ float* joined_of(const ClusterBlock& s, int start) {
  const int place = s.p.division.blocks > 1 ? start / kSumDepth % 2 : 0;
  return s.of_columns() + place * kClusterRows * kJoinedPitch;
}

// Adds up the warpgroups' sums there, for other blocks. Barriers of the block.
__device__ __forceinline__ void join_parts(const ClusterBlock& s, const DepthSums& sum,
                                           const float (&back)[2], int start) {
  MGHF_UNROLL(1)
  for (int part = 0; part < s.p.division.parts; ++part) {
    if (part == s.part) {
      float* const joined = joined_of(s, start);
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        float* const to = joined + (16 * s.warp + s.g + 8 * half) * kJoinedPitch + 2 * s.t;
        MGHF_UNROLL_ALL
        for (int eight = 0; eight < kSumDepth / 8; ++eight) {
          float2& at = reinterpret_cast<float2&>(to[8 * eight]);
          const float2 before = part == 0 ? float2{0, 0} : at;
          at = {before.x + sum[eight][2 * half] * back[half],
                before.y + sum[eight][2 * half + 1] * back[half]};
        }
      }
    }
    __syncthreads();
  }
}

// Writes the block's share of a tile's gradients, for some of the depth, from the blocks' sums.
__device__ __forceinline__ void write_rows(const ClusterBlock& s, int tile, int start,
                                           const Matrices& key, void* result) {
  const int depth = static_cast<int>(key.columns);
  const int blocks = s.p.division.blocks, rows = s.p.division.share;
  MGHF_UNROLL(1)
  for (int e = s.thread; e < rows * kSumDepth; e += s.threads()) {
    const int r = s.rank * rows + e / kSumDepth, d = start + e % kSumDepth;
    const int i = tile * kClusterRows + r;
    if (r >= kClusterRows || i >= s.n || d >= depth) continue;
    float* const own = joined_of(s, start) + r * kJoinedPitch + e % kSumDepth;
    float total = 0;
    MGHF_UNROLL(1)
    for (int of = 0; of < blocks; ++of) total += *of_block(own, static_cast<unsigned>(of));
    total *= s.state().key_back;
    const int64_t place = (static_cast<int64_t>(s.state().map) * s.n + i) * depth + d;
    write_element(key.element, result, place, total);
  }
}

// The gradient of a tile's rows, from their similarities.
__device__ __forceinline__ void write_gradient(const ClusterBlock& s, Products112& x, int tile,
                                               const Matrices& key, void* result) {
  differentiate(s.again(), x, tile);
  const PackedEntries packed(x);
  wait_for_copies<0>();
  // A cluster's sums have two places in turn, so that none is written while others read it: the
  // barrier of the ones between is past then. A block alone has one, and waits.
  MGHF_UNROLL(1)
  for (int start = 0; start < kMostDepth; start += kSumDepth) {
    DepthSums sum = {};
    multiply_by_keys(s.again(), packed, start, sum);
    join_parts(s.again(), sum, packed.back, start);
    if (s.p.division.blocks > 1) sync_cluster();
    write_rows(s.again(), tile, start, key, result);
    if (s.p.division.blocks == 1) __syncthreads();
  }
}

}  // namespace

}  // namespace mghf::cuda
