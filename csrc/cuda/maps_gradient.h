// Gradients that are a product of a matrix with an image's maps, and terms of each map: for a
// pixel,
//
//     grad_i = sum_j K_ij S_j + ...,      i and j maps that are kept
//
// A block takes 64 pixels and up to 128 channels, 64 at a time. It reads its pixels of the kept
// maps, 64 at a time, into shared memory; each of its warps multiplies a quarter of the pixels with
// half of the rows of K, which come from the caches in a tensor core's order, as two TF32 each; the
// product goes through shared memory to the threads that read the other terms and write the
// gradient, along the pixels or along the channels, whichever are contiguous.
//
// The rows of K come in groups: those of the kept maps among 64 channels, in tiles of 16.
#pragma once

#include "maps_product.h"

namespace mghf::cuda {

constexpr int kGroup = 64;
constexpr int kGroupsOfBlock = 2;  // one after the other, with the same pixels of the kept maps
constexpr int kRowTiles = kGroup / 16;
constexpr int kGradientPixels = 64;
constexpr int kGradientThreads = 256;
static_assert(kGroup == kProductMaps && kGradientThreads == kProductThreads);

__host__ __device__ constexpr int64_t groups_of(int64_t channels) {
  return (channels + kGroup - 1) / kGroup;
}
__host__ __device__ constexpr int64_t depths_of(int64_t maps) { return (maps + 7) / 8; }
inline int64_t number_of_fragments(int64_t batch, int64_t channels, int64_t maps) {
  return batch * groups_of(channels) * kRowTiles * depths_of(maps) * kWarp * 2;
}

// Writes the fragments of a tile of 16 rows, by a block: element(row, column) of K, or 0 beyond its
// rows and columns.
template <class Element>
__device__ void write_fragments(uint4* target, int rows, int columns, const Element& element) {
  const int depths = static_cast<int>(depths_of(columns));
  for (int i = threadIdx.x; i < depths * kWarp; i += kGradientThreads) {
    const int g = i % kWarp / 4, t = i % 4;
    SplitA a;
    MGHF_UNROLL_ALL
    for (int k = 0; k < 4; ++k) {
      const int row = g + k % 2 * 8, column = i / kWarp * 8 + t + k / 2 * 4;
      const float x = row < rows && column < columns ? element(row, column) : 0.0f;
      a.big[k] = nearest_tf32(x);  // which may be all that is used
      a.small[k] = SplitTf32(x).small;
    }
    target[i * 2] = {a.big[0], a.big[1], a.big[2], a.big[3]};
    target[i * 2 + 1] = {a.small[0], a.small[1], a.small[2], a.small[3]};
  }
}

// Adds the products of the k-th 8 maps of the features, 16 pixels of them from `pixel` on, with two
// tiles of 16 rows: factor(m, a) gives the m-th tile's factor, or false if it has no rows.
template <bool kOnce, class T, class Tile, class Factor>
__device__ __forceinline__ void add_depth(float (&parts)[2][2][4], const float* features, int k,
                                          int pixel, const Factor& factor) {
  constexpr bool kExactB = kOnce || exact_in_tf32<T>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  SplitB of_b[2];
  MGHF_UNROLL_ALL
  for (int n = 0; n < 2; ++n) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      put_cut<kOnce>(of_b[n].big[i], of_b[n].small[i],
                     features[Tile::at(k * 8 + t + i * 4, pixel + n * 8 + g)]);
    }
  }
  MGHF_UNROLL_ALL
  for (int m = 0; m < 2; ++m) {
    SplitA a;
    if (!factor(m, a)) continue;
    mma_split<kOnce, kExactB>(parts[m][0], a, of_b[0]);
    mma_split<kOnce, kExactB>(parts[m][1], a, of_b[1]);
  }
}

// Stores the products of two tiles of rows from `half` on, those that have rows.
template <class Tile>
__device__ __forceinline__ void store_products(float* product, const float (&sums)[2][2][4],
                                               int half, int rows, int pixel) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  MGHF_UNROLL_ALL
  for (int m = 0; m < 2; ++m) {
    if (half + m * 16 >= rows) continue;
    MGHF_UNROLL_ALL
    for (int n = 0; n < 2; ++n) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        product[Tile::at(half + m * 16 + g + i / 2 * 8, pixel + n * 8 + 2 * t + i % 2)] =
            sums[m][n][i];
      }
    }
  }
}

// `Terms` knows which maps are kept, and the coefficients of their gradients.
template <class T, Reading kReading, bool kByMaps, class Terms>
__global__ void __launch_bounds__(kGradientThreads, 2)
    gradient(Image<T> sr, MutableImage<T> grad, const uint4* fragments, Terms terms, int maps,
             int tiles, bool once) {
  using Reader = TileReader<T, kReading, kByMaps, kGradientPixels>;
  using Tile = MapTile<kByMaps, kGradientPixels>;
  constexpr int kStep = Reader::kStep;
  alignas(16) __shared__ float features[Tile::kSize];
  alignas(16) __shared__ float product[Tile::kSize];
  __shared__ int channels_of_chunk[kProductMaps];

  const int channels = static_cast<int>(sr.channels), pixels = static_cast<int>(sr.pixels());
  const int groups = static_cast<int>(groups_of(channels));
  const int parts = (groups + kGroupsOfBlock - 1) / kGroupsOfBlock;
  const int block = static_cast<int>(blockIdx.x);
  const int first_group = block % parts * kGroupsOfBlock;
  const int last_group =
      first_group + kGroupsOfBlock < groups ? first_group + kGroupsOfBlock : groups;
  const int first = block / parts % tiles * kGradientPixels;
  const int64_t b = block / parts / tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int pixel = warp % 4 * 16, half = warp / 4 * 32;
  const int chunks = (maps + kProductMaps - 1) / kProductMaps;
  const int depths = static_cast<int>(depths_of(maps));

  const auto of_chunk = [&](int map) { return channels_of_chunk[map]; };
  for (int group = first_group; group < last_group; ++group) {
    const int start = terms.kept_before(b, group);
    const int rows = terms.kept_before(b, group + 1) - start;
    float sums[2][2][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int first_map = chunk * kProductMaps;
      const int maps_of_chunk = maps - first_map < kProductMaps ? maps - first_map : kProductMaps;
      if (chunks > 1 || group == first_group) {
        if (thread < maps_of_chunk) channels_of_chunk[thread] = terms.kept(b, first_map + thread);
        __syncthreads();  // also ends the products of the chunk before
        MGHF_UNROLL(1)
        for (int pass = 0; pass < Reader::kPasses; pass += Reader::kAtOnce) {
          float values[Reader::kValues];
          Reader::read(values, sr, b, of_chunk, maps_of_chunk, first, pixels, pass);
          Reader::store(features, values, pass);
        }
        __syncthreads();
      }
      // The sums of a chunk, added outside the tensor cores, which truncate at every addition.
      float parts[2][2][4] = {};
      const int depths_of_chunk = (maps_of_chunk + 7) / 8;
      const auto multiply = [&](auto one_product) {
        constexpr bool kOnce = decltype(one_product)::value;
        MGHF_UNROLL(2)
        for (int k = 0; half < rows && k < depths_of_chunk; ++k) {
          add_depth<kOnce, T, Tile>(parts, features, k, pixel, [&](int m, SplitA& a) {
            const int tile = half / 16 + m;
            if (tile * 16 >= rows) return false;
            const int64_t at =
                ((b * groups + group) * kRowTiles + tile) * depths + first_map / 8 + k;
            const uint4 big = fragments[(at * kWarp + lane) * 2];
            const uint4 small = kOnce ? uint4{} : fragments[(at * kWarp + lane) * 2 + 1];
            a = {{big.x, big.y, big.z, big.w}, {small.x, small.y, small.z, small.w}};
            return true;
          });
        }
      };
      if (once) {
        multiply(std::true_type{});
      } else {
        multiply(std::false_type{});
      }
      MGHF_UNROLL_ALL
      for (int i = 0; i < 16; ++i) {
        sums[i / 8][i / 4 % 2][i % 4] += parts[i / 8][i / 4 % 2][i % 4];
      }
    }
    if (group > first_group) __syncthreads();  // the product of the group before has been read
    store_products<Tile>(product, sums, half, rows, pixel);
    __syncthreads();

    // The reads of some passes, all before the first write.
    const auto of_group = [&](int map) { return group * kGroup + map; };
    const int channels_of_group = channels - group * kGroup;
    MGHF_UNROLL(1)
    for (int pass = 0; pass < Reader::kPasses; pass += Reader::kAtOnce) {
      float of_s[Reader::kValues] = {}, of_g[Reader::kValues] = {};
      if constexpr (Terms::kReadsPair) {
        Reader::read(of_s, sr, b, of_group, channels_of_group, first, pixels, pass);
        Reader::read(of_g, terms.gt, b, of_group, channels_of_group, first, pixels, pass);
      }
      MGHF_UNROLL_ALL
      for (int i = 0; i < Reader::kAtOnce; ++i) {
        const int channel = group * kGroup + Reader::map_of(pass + i);
        const int p = Reader::pixel_of(pass + i);
        if (channel >= channels || first + p >= pixels) continue;
        const auto term = terms.of(b, channel);
        const int place = term.place();
        float of_product[kStep] = {}, result[kStep];
        if (place >= 0) {
          const float* const source = product + Tile::at(place - start, p);
          if constexpr (kStep == 4) {
            load_four(of_product, source);
          } else {
            of_product[0] = *source;
          }
        }
        MGHF_UNROLL_ALL
        for (int k = 0; k < kStep; ++k) {
          result[k] = term.gradient(of_s[i * kStep + k], of_g[i * kStep + k], of_product[k]);
        }
        grad.template write<kReading>(result, grad.map(b, channel), first + p);
      }
    }
  }
}

template <Reading kReading, class T, class Terms>
const char* write_gradient(const Image<T>& sr, const MutableImage<T>& grad, const uint4* fragments,
                           const Terms& terms, int64_t maps, bool once, Stream stream) {
  const int64_t tiles = (sr.pixels() + kGradientPixels - 1) / kGradientPixels;
  const int64_t parts = (groups_of(sr.channels) + kGroupsOfBlock - 1) / kGroupsOfBlock;
  const Grid grid{sr.batch * tiles * parts, kGradientThreads};
  if (sr.by_maps()) {
    return launch(gradient<T, kReading, true, Terms>, grid, stream, sr, grad, fragments, terms,
                  static_cast<int>(maps), static_cast<int>(tiles), once);
  }
  if constexpr (pixels_of(kReading) == 1) {
    return launch(gradient<T, kReading, false, Terms>, grid, stream, sr, grad, fragments, terms,
                  static_cast<int>(maps), static_cast<int>(tiles), once);
  }
  return "pixels of maps side by side are not read by fours";
}

}  // namespace mghf::cuda
