// The solver's work on matrices that do not fit on chip: the sweeps over rows in the device's
// memory, and the matrices that a cluster takes in turn. See sinkhorn_solver.h.
//
// A multiprocessor has one block of 8 warps, so the memory is as busy as the lanes have loads under
// way: a lane loads kWords entries of each of two rows before it uses the first. Rows of up to
// kChunksOfLane chunks, 1792 columns, come from memory once for both sums of an iteration: with the
// row sums known, a warp reads its two rows again, 14 KB that the L1 cache still has.
//
// Predicted for an H200: a multiprocessor has 8 x 28 x 128 bytes under way, 3.8 MB on all of them,
// where 4.3 TB/s at 0.8 us need 3.4 MB. An iteration of 128 maps of N = 1764 reads 1.6 GB: 0.4 ms.
// With 4 loads of a lane under way, twice over all entries, it would be 4.7 ms.
#pragma once

#include "sinkhorn_solver.h"

namespace mghf::cuda {

constexpr int kChunksOfLane = 4;

template <int kColumnWords, bool kOnChip>
template <class Entry, class Coefficient, class Finish>
__device__ __forceinline__ void Solver<kColumnWords, kOnChip>::sweep_chunks(
    const float* weights, const Entry& entry, const Coefficient& coefficient,
    const Finish& finish) {
  if (!std::is_same_v<Entry, Plain> || chunks > kChunksOfLane) {
    for_rows([&](int r) {
      float sum = 0;
      MGHF_UNROLL(1)
      for (int left = lane; left < pitch; left += kLoaded * kWarp) {
        float x[kLoaded];
        load_columns(x, &at(r, left));
        MGHF_UNROLL_ALL
        for (int k = 0; k < kLoaded; ++k) {
          sum += entry(r, left + k * kWarp, x[k]) * weights[left + k * kWarp];
        }
      }
      const float c = coefficient(r, across_lanes(sum, Add{}));
      if (lane == 0) coefficients[r] = c;
    });
    __syncwarp();
    finish();
    sweep_columns<Add>([&](float total, int r, int j, float x) {
      return total + coefficients[r] * entry(r, j, x);
    });
    return;
  }
  float total[kChunksOfLane][kWords] = {};
  MGHF_UNROLL(1)
  for (int r = warp * kGroup; r < rows; r += warps * kGroup) {
    float x[kGroup][kWords], c[kGroup] = {};
    const auto load = [&](int chunk) {
      MGHF_UNROLL_ALL
      for (int g = 0; g < kGroup; ++g) load_columns(x[g], &at(r + g, chunk * kWidth + lane));
    };
    MGHF_UNROLL(1)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      load(chunk);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kWords; ++k) {
        const float weight = weights[chunk * kWidth + lane + k * kWarp];
        MGHF_UNROLL_ALL
        for (int g = 0; g < kGroup; ++g) c[g] += x[g][k] * weight;
      }
    }
    MGHF_UNROLL_ALL
    for (int g = 0; g < kGroup; ++g) c[g] = coefficient(r + g, across_lanes(c[g], Add{}));
    MGHF_UNROLL_ALL
    for (int chunk = 0; chunk < kChunksOfLane; ++chunk) {
      if (chunk >= chunks) continue;
      load(chunk);
      MGHF_UNROLL_ALL
      for (int k = 0; k < kWords; ++k) {
        MGHF_UNROLL_ALL
        for (int g = 0; g < kGroup; ++g) total[chunk][k] += c[g] * x[g][k];
      }
    }
  }
  finish();
  MGHF_UNROLL_ALL
  for (int chunk = 0; chunk < kChunksOfLane; ++chunk) {
    if (chunk >= chunks) continue;
    MGHF_UNROLL_ALL
    for (int k = 0; k < kWords; ++k) partial[warp * kWidth + lane + k * kWarp] = total[chunk][k];
    join_warps<Add>(chunk);
    __syncthreads();
  }
}

// Calls solve(solver) for the matrices that the block has a part in, and ends each with a barrier
// of the matrix's blocks: others may still read this one's shared memory.
template <int kWords, bool kOnChip, class Solve>
__device__ __forceinline__ void for_maps(const Problem& p, float* shared, int64_t batch,
                                         const Solve& solve) {
  using S = Solver<kWords, kOnChip>;
  const int blocks = S::blocks_of(p);
  const auto solve_one = [&](int map) {
    S s(p, shared, map);
    solve(s);
    s.sync_all();
  };
  const int map = static_cast<int>(blockIdx.x) / blocks;
  MGHF_UNROLL(1)
  for (int next = map; next < batch; next += static_cast<int>(gridDim.x) / blocks) {
    solve_one(next);
    if (blocks == 1) __syncthreads();  // before the next matrix takes this one's memory
  }
}

}  // namespace mghf::cuda
