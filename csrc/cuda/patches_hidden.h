// The gradient before the ReLU; see patches.cu.
#pragma once

#include "patches_geometry.h"

namespace mghf::cuda {

namespace {

// Gradients use three products of bfloat16 (`SplitPair`), which cost half as much as three of TF32
// and have an error of 5e-6.

constexpr int kDepth = 32;            // of a slice
constexpr int kPitch = kDepth + 4;    // of float32, without bank conflicts
constexpr int kEights = kDepth / 8;   // of a slice, each with two pieces
constexpr int kPiecesOfSlice = 2 * kEights;

// Eight neighbouring units of a row or column, as four pairs of big parts and, in the next piece,
// of small parts: a row of the matrices that load_matrices() loads.
__host__ __device__ constexpr int pieces_of(int hidden) {
  return (hidden + kDepth - 1) / kDepth * kPiecesOfSlice;
}

// A block's result is 128 rows x 128 units at a time; the slices of d_y are computed as they are
// put into shared memory. Writes d_h as pieces (rows, pieces_of(hidden)), or else as numbers
// (rows, hidden) together with d_y (rows, dimension).
//
// Predicted: reads d_e, e and the state, 30 MB, and writes 29 MB: 14 us. R 64 128 = 0.46 G
// multiply-adds by three products of TF32: 9 us.
template <bool kPieces>
__global__ void __launch_bounds__(kThreads, kPieces && kClusters ? 2 : 1)  // spills otherwise
    hidden_gradient(Patches p, EmbeddingGradient gradient, Factor weight2, uint32_t* pieces,
                    float* grad_hidden, float* grad_output) {
  __shared__ int64_t state_places[kRows], embedding_places[kRows], grad_places[kRows];
  __shared__ float along[kRows], norms[kRows];
  __shared__ float slice[kRows * kPitch];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const ThreadPlace place;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(smaller(p.number() - first_row, kRows));

  if (thread < rows) {
    const Row row(first_row + thread, p.maps, p.of_map(), p.maps_fastest);
    state_places[thread] = row.item * p.state_words() * gradient.state_step + row.map;
    embedding_places[thread] = (row.map * p.of_map() + row.item) * p.dimension;
    grad_places[thread] = row.map * gradient.map_stride + row.item * gradient.patch_stride;
    norms[thread] = bits_as<float>(gradient.state[state_places[thread]]);
  }
  __syncthreads();
  const auto grad_at = [&](int row, int d) {
    return gradient.grad[grad_places[row] + d * gradient.dimension_stride];
  };
  const auto embedding_at = [&](int row, int d) {
    return gradient.embedding[embedding_places[row] + d];
  };
  for (int row = place.warp; row < rows; row += kThreads / kWarp) {
    float sum = 0;
    for (int d = lane; d < p.dimension; d += kWarp) sum += grad_at(row, d) * embedding_at(row, d);
    MGHF_UNROLL_ALL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    // At y = 0 the embedding is 0 as well; the smallest normal number only prevents 0/0.
    const float least = norms[row] < kTiny ? kTiny : norms[row];
    if (lane == 0) along[row] = sum * ((least + kNormFloor) / least);
  }
  __syncthreads();

  for (int first_unit = 0; first_unit < p.hidden; first_unit += kColumns) {
    const int columns = p.hidden - first_unit - place.warp_column;
    Sums sums = {};
    MGHF_UNROLL(1)
    for (int first_d = 0; first_d < p.dimension; first_d += kDepth) {
      MGHF_UNROLL(2)
      for (int c = opaque(thread); c < kRows * kDepth; c += kThreads) {
        const int row = c / kDepth, d = first_d + c % kDepth;
        float value = 0;
        if (row < rows && d < p.dimension) {
          value = (grad_at(row, d) - embedding_at(row, d) * along[row]) / (norms[row] + kNormFloor);
          if (!kPieces && first_unit == 0) {
            grad_output[(first_row + row) * p.dimension + d] = value;
          }
        }
        slice[row * kPitch + c % kDepth] = value;
      }
      __syncthreads();
      const auto multiply = [&](auto one_product) {
        constexpr bool kOnce = decltype(one_product)::value;
        MGHF_UNROLL(1)
        for (int first = 0; first < kDepth && first_d + first < p.dimension; first += 8) {
          SplitA a[kRowTiles];
          MGHF_UNROLL_ALL
          for (int i = 0; i < kRowTiles; ++i) {
            MGHF_UNROLL_ALL
            for (int part = 0; part < 4; ++part) {
              const int row = place.row + 16 * i + part % 2 * 8;
              put<kOnce>(a[i], part, slice[row * kPitch + first + place.t + part / 2 * 4]);
            }
          }
          MGHF_UNROLL_ALL
          for (int run = 0; run < kColumnTiles; run += kRun) {
            if (run * 8 >= columns) break;
            add_four_tiles<false, kOnce>(sums, run, a,
                                         weight2.at(first_unit + place.warp_column + 8 * run,
                                                    first_d + first));
          }
        }
      };
      if (p.once) {
        multiply(std::true_type{});
      } else {
        multiply(std::false_type{});
      }
      __syncthreads();  // the slice has been used
    }

    // Recomputed, because kept during the products it would spill.
    const int64_t own_row = static_cast<int64_t>(opaque(static_cast<int>(blockIdx.x))) * kRows;
    const int state_word = 1 + (first_unit + place.warp_column) / 32;
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) {
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + 16 * i + 8 * half;
        if (row >= rows) continue;
        unsigned words[2] = {0, 0};
        MGHF_UNROLL_ALL
        for (int word = 0; word < 2; ++word) {
          if (state_word + word < p.state_words()) {
            words[word] = static_cast<unsigned>(
                gradient.state[state_places[row] + (state_word + word) * gradient.state_step]);
          }
        }
        MGHF_UNROLL_ALL
        for (int j = 0; j < kColumnTiles; ++j) {
          const int unit = first_unit + place.column + 8 * j;
          float value[2];
          MGHF_UNROLL_ALL
          for (int c = 0; c < 2; ++c) {
            const float positive = words[j / 4] >> (unit + c) % 32 & 1 ? 1.0f : 0.0f;
            // A product and not a selection: a NaN must stay one.
            value[c] = unit + c < p.hidden ? sums[i][j][2 * half + c] * positive : 0.0f;
            if (!kPieces && unit + c < p.hidden) {
              grad_hidden[(own_row + row) * p.hidden + unit + c] = value[c];
            }
          }
          const int piece = unit / 8 * 2;
          if (!kPieces || piece >= pieces_of(p.hidden)) continue;
          const SplitPair pair(value[0], value[1]);
          uint32_t* const to =
              pieces + ((own_row + row) * pieces_of(p.hidden) + piece) * 4 + place.t;
          to[0] = pair.big;
          to[4] = pair.small;
        }
      }
    }
  }
}

}  // namespace

}  // namespace mghf::cuda
