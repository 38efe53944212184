// Products of feature maps, summed over the pixels, by tensor cores, for Gram matrices.
//
//     pair:   product_ij = sum (S - G)_i (S + G)_j,   whose symmetric part is S S^T - G G^T
//     single: product_ij = sum X_i X_j
//
// A block takes 64 x 64 maps and a run of pixels, 32 pixels at a time: it reads them (the next 32
// while it computes), stores what is to be multiplied in shared memory as float32, and its warps
// take 32 x 16 maps of the product each. Three products of TF32 are about as exact as float32.
// Tensor cores truncate instead of rounding to nearest, so long sums would drift: every 32 pixels
// theirs are added to sums in float32. The runs' products, in a workspace, are added in float64 in
// a fixed order.
//
// Per 8 pixels a block has 96 tensor-core instructions, 147 cycles of an H200's SM at 300 TFLOP/s,
// and each of the SM's four schedulers issues about 130 instructions for it.
#pragma once

#include "histograms.h"
#include "last_block.h"
#include "mma.h"

namespace mghf::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductMaps = 64;
constexpr int kProductPixels = 32;
constexpr int kProductElements = kProductMaps * kProductMaps;

// A tile is the product of two groups of 64 maps, i and j; of a single product i <= j.
__host__ __device__ constexpr int64_t product_tiles(int64_t maps, bool pair) {
  const int64_t groups = (maps + kProductMaps - 1) / kProductMaps;
  return pair ? groups * groups : groups * (groups + 1) / 2;
}
__host__ __device__ constexpr int64_t product_tile(int64_t maps, bool pair, int64_t i, int64_t j) {
  return pair ? i * ((maps + kProductMaps - 1) / kProductMaps) + j : j * (j + 1) / 2 + i;
}
// The groups of a tile.
struct TilePlace {
  int i = 0, j = 0;

  __device__ TilePlace(int64_t maps, bool pair, int tile) {
    while (product_tile(maps, pair, pair ? i + 1 : 0, pair ? 0 : j + 1) <= tile) ++(pair ? i : j);
    (pair ? j : i) = tile - static_cast<int>(product_tile(maps, pair, i, j));
  }
};

// Enough blocks for a large GPU, two to an SM, from one image.
inline Runs product_runs(int64_t pixels, int64_t maps, bool pair) {
  const int64_t wanted = 256 / product_tiles(maps, pair);
  return {pixels, 1024, wanted > 16 ? wanted : 16};
}

// Maps and pixels of a tile in shared memory, with either a map's pixels or a pixel's maps
// contiguous. Neither writing it nor reading fragments of it has bank conflicts.
template <bool kByMaps, int kPixels>
struct MapTile {
  static constexpr int kStride = kByMaps ? kPixels + (kPixels == 32 ? 4 : 8)
                                         : kProductMaps + (kPixels == 32 ? 8 : 4);
  static constexpr int kSize = kByMaps ? kProductMaps * kStride : kPixels * kStride;

  __device__ static constexpr int at(int map, int pixel) {
    return kByMaps ? map * kStride + pixel : pixel * kStride + map;
  }
};

// How a block's threads read a tile of 64 maps: in `kPasses` passes, in each of which a thread
// reads pixels_of(kReading) pixels of a map; `kAtOnce` passes are in flight at once.
template <class T, Reading kReading, bool kByMaps, int kPixels>
struct TileReader {
  static constexpr int kStep = pixels_of(kReading);
  static constexpr int kLanes = kByMaps ? kPixels / kStep : kProductMaps;
  static constexpr int kRows = kProductThreads / kLanes;
  static constexpr int kPasses = kProductMaps * kPixels / kProductThreads / kStep;
  static constexpr int kAtOnce = kPasses < 8 ? kPasses : 8;
  static constexpr int kValues = kAtOnce * kStep;
  using Tile = MapTile<kByMaps, kPixels>;

  __device__ static int map_of(int pass) {
    const int thread = static_cast<int>(threadIdx.x);
    return kByMaps ? thread / kLanes + pass * kRows : thread % kLanes;
  }
  __device__ static int pixel_of(int pass) {
    const int thread = static_cast<int>(threadIdx.x);
    return kByMaps ? thread % kLanes * kStep : thread / kLanes + pass * kRows;
  }
  // Reads kAtOnce passes of the channels channel_of(0) to channel_of(maps - 1), pixels from `first`
  // on. Zeros beyond the maps and the pixels.
  template <class ChannelOf>
  __device__ static void read(float (&values)[kValues], const Image<T>& x, int64_t b,
                              const ChannelOf& channel_of, int maps, int first, int end,
                              int pass = 0) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kAtOnce; ++i) {
      float some[kStep] = {};
      const int p = first + pixel_of(pass + i);
      if (map_of(pass + i) < maps && p < end) {
        x.template read<kReading>(some, x.map(b, channel_of(map_of(pass + i))), p);
      }
      MGHF_UNROLL_ALL
      for (int k = 0; k < kStep; ++k) values[i * kStep + k] = some[k];
    }
  }
  __device__ static void store(float* tile, const float (&values)[kValues], int pass = 0) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kAtOnce; ++i) {
      float* const target = tile + Tile::at(map_of(pass + i), pixel_of(pass + i));
      if constexpr (kStep == 4) {
        store_four(target,
                   {values[i * 4], values[i * 4 + 1], values[i * 4 + 2], values[i * 4 + 3]});
      } else {
        *target = values[i];
      }
    }
  }
};

// A factor of three products, or the nearest TF32, of one.
template <bool kOnce>
__device__ __forceinline__ void put_cut(uint32_t& big, uint32_t& small, float x) {
  if constexpr (kOnce) {
    big = nearest_tf32(x);
    small = 0;
  } else {
    const CutTf32 cut(x);
    big = cut.big;
    small = cut.small;
  }
}

// `once`: one product of TF32 instead of three.
template <class T, Reading kReading, bool kByMaps, bool kPair>
__global__ void __launch_bounds__(kProductThreads, kReading == Reading::strided ? 1 : 2)
    products_of_runs(Image<T> gt, Image<T> sr, const int* order, float* partial, int maps,
                     Runs runs, bool once) {
  using Reader = TileReader<T, kReading, kByMaps, kProductPixels>;
  using Tile = MapTile<kByMaps, kProductPixels>;
  constexpr bool kExact = !kPair && exact_in_tf32<T>;
  alignas(16) __shared__ float left_tiles[2 * Tile::kSize];
  alignas(16) __shared__ float right_tiles[2 * Tile::kSize];
  __shared__ int left_channels[kProductMaps], right_channels[kProductMaps];

  const int tiles = static_cast<int>(product_tiles(maps, kPair));
  const int tile = static_cast<int>(blockIdx.x % tiles);
  const int64_t run = blockIdx.x / tiles % runs.number, b = blockIdx.x / tiles / runs.number;
  const TilePlace place(maps, kPair, tile);
  const int first_i = place.i * kProductMaps, first_j = place.j * kProductMaps;
  const bool same = first_i == first_j;
  const int maps_i = maps - first_i < kProductMaps ? maps - first_i : kProductMaps;
  const int maps_j = maps - first_j < kProductMaps ? maps - first_j : kProductMaps;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const auto channel_of = [&](int map) {
    return order == nullptr ? map : order[b * maps + map];
  };
  if (thread < maps_i) left_channels[thread] = channel_of(first_i + thread);
  if (thread < maps_j) right_channels[thread] = channel_of(first_j + thread);
  __syncthreads();

  // Pixels read while the previous ones are computed: S and G of maps i, or X of maps i and j.
  const int begin = static_cast<int>(runs.begin(run));
  const int end = static_cast<int>(runs.end(run, sr.pixels()));
  float first[Reader::kValues] = {}, second[Reader::kValues] = {};
  const auto of_i = [&](int map) { return left_channels[map]; };
  const auto of_j = [&](int map) { return right_channels[map]; };
  const auto read = [&](int p) {
    Reader::read(first, sr, b, of_i, maps_i, p, end);
    if (kPair) {
      Reader::read(second, gt, b, of_i, maps_i, p, end);
    } else if (!same) {
      Reader::read(second, sr, b, of_j, maps_j, p, end);
    }
  };
  const auto store = [&](float* left, float* right, int p) {
    if constexpr (!kPair) {
      Reader::store(left, first);
      if (!same) Reader::store(right, second);
    } else {
      float sums[Reader::kValues];
      MGHF_UNROLL_ALL
      for (int i = 0; i < Reader::kValues; ++i) {
        sums[i] = first[i] + second[i];
        first[i] -= second[i];
      }
      Reader::store(left, first);
      if (!same) {
        Reader::read(sums, sr, b, of_j, maps_j, p, end);
        Reader::read(second, gt, b, of_j, maps_j, p, end);
        MGHF_UNROLL_ALL
        for (int i = 0; i < Reader::kValues; ++i) sums[i] += second[i];
      }
      Reader::store(right, sums);
    }
  };

  const int g = lane / 4, t = lane % 4, i0 = warp / 4 * 32, j0 = warp % 4 * 16;
  const bool computes = i0 < maps_i && j0 < maps_j;
  float product[2][2][4] = {}, sum[2][2][4] = {};
  const auto for_elements = [&](const auto& f) {
    MGHF_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      MGHF_UNROLL_ALL
      for (int n = 0; n < 2; ++n) {
        MGHF_UNROLL_ALL
        for (int k = 0; k < 4; ++k) f(m, n, k);
      }
    }
  };
  const auto move_to_sums = [&](int m, int n, int k) {
    sum[m][n][k] += product[m][n][k];
    product[m][n][k] = 0;
  };

  read(begin);
  int step = 0;
  for (int p = begin; p < end; p += kProductPixels, ++step) {
    float* const left = left_tiles + step % 2 * Tile::kSize;
    float* const right = !kPair && same ? left : right_tiles + step % 2 * Tile::kSize;
    store(left, right, p);
    __syncthreads();  // also ends the products of two steps ago, whose tiles are overwritten next
    if (p + kProductPixels < end) read(p + kProductPixels);
    if (!computes) continue;
    const auto multiply = [&](auto one_product) {
      constexpr bool kOnce = decltype(one_product)::value;
      MGHF_UNROLL(kOnce ? 1 : kProductPixels / 8)
      for (int eight = 0; eight < kProductPixels; eight += 8) {
        const int depth = eight + t;
        SplitA a[2];
        MGHF_UNROLL_ALL
        for (int m = 0; m < 2; ++m) {
          MGHF_UNROLL_ALL
          for (int k = 0; k < 4; ++k) {
            put_cut<kOnce>(a[m].big[k], a[m].small[k],
                           left[Tile::at(i0 + m * 16 + g + k % 2 * 8, depth + k / 2 * 4)]);
          }
        }
        MGHF_UNROLL_ALL
        for (int n = 0; n < 2; ++n) {
          SplitB of_b;
          MGHF_UNROLL_ALL
          for (int k = 0; k < 2; ++k) {
            put_cut<kOnce>(of_b.big[k], of_b.small[k],
                           right[Tile::at(j0 + n * 8 + g, depth + k * 4)]);
          }
          mma_split<kExact || kOnce, kExact || kOnce>(product[0][n], a[0], of_b);
          mma_split<kExact || kOnce, kExact || kOnce>(product[1][n], a[1], of_b);
        }
      }
    };
    if (!kExact && once) {
      multiply(std::true_type{});
    } else {
      multiply(std::false_type{});
    }
    for_elements(move_to_sums);
  }
  float* const target =
      partial + ((b * tiles + tile) * runs.number + run) * kProductElements;
  for_elements([&](int m, int n, int k) {
    target[(i0 + m * 16 + g + k / 2 * 8) * kProductMaps + j0 + n * 8 + 2 * t + k % 2] =
        sum[m][n][k];
  });
}

// Adds up the runs' products; a block takes 32 elements, each of its warps a part of the runs. With
// `Then` a block that has stored its sums calls `added`.
template <class Sum, class Then>
__global__ void __launch_bounds__(kProductThreads)
    sums_of_products(const float* partial, Sum* totals, int64_t runs, Then then) {
  __shared__ Sum sums[kSweepWarps][kWarp];
  constexpr int kBlocks = kProductElements / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t tile = blockIdx.x / kBlocks;
  const int64_t element = blockIdx.x % kBlocks * kWarp + lane;
  Sum sum = 0;
  MGHF_UNROLL(8)
  for (int64_t run = warp; run < runs; run += kSweepWarps) {
    sum += static_cast<Sum>(partial[(tile * runs + run) * kProductElements + element]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    for (int i = 1; i < kSweepWarps; ++i) sum += sums[i][lane];
    totals[tile * kProductElements + element] = sum;
  }
  if constexpr (Then::kWanted) then.added(tile, kBlocks);
}

// Index of the element of maps i and j among the totals of an image.
__device__ __forceinline__ int64_t place_of_total(int64_t maps, bool pair, int i, int j) {
  return product_tile(maps, pair, i / kProductMaps, j / kProductMaps) * kProductElements +
         i % kProductMaps * kProductMaps + j % kProductMaps;
}

__host__ __device__ constexpr int64_t product_totals(int64_t batch, int64_t maps, bool pair) {
  return batch * product_tiles(maps, pair) * kProductElements;
}

// The totals of `maps` maps, those that `order` names or, if it is null, all.
template <bool kPair, Reading kReading, class T, class Then = Nothing>
const char* products(const Image<T>& gt, const Image<T>& sr, const int* order, int64_t maps,
                     float* partial, double* totals, bool once, Stream stream,
                     const Then& then = {}) {
  const Runs runs = product_runs(sr.pixels(), maps, kPair);
  const int64_t tiles = sr.batch * product_tiles(maps, kPair);
  const Grid grid{tiles * runs.number, kProductThreads};
  const int m = static_cast<int>(maps);
  const char* error = nullptr;
  if (sr.by_maps()) {
    error = launch(products_of_runs<T, kReading, true, kPair>, grid, stream, gt, sr, order,
                   partial, m, runs, once);
  } else if constexpr (pixels_of(kReading) == 1) {
    error = launch(products_of_runs<T, kReading, false, kPair>, grid, stream, gt, sr, order,
                   partial, m, runs, once);
  }
  if (error != nullptr) return error;
  return launch(sums_of_products<double, Then>,
                {tiles * (kProductElements / kWarp), kProductThreads}, stream, partial, totals,
                runs.number, then);
}

}  // namespace mghf::cuda
