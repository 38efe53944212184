// The gradient of content_style for up to 64 kept maps, tiles of pixels streamed past K.
//
// A block has all of K in shared memory, in a tensor core's order, and the coefficients of all
// maps. It goes through tiles of 64 pixels: its warps multiply the kept maps' pixels with K, once
// for all channels, and the product goes through shared memory to the threads that write the
// gradient. Loads are under way while others are used: a thread has the kept maps of the next tile
// in registers, and of the pair's values those of its next kAhead places, which may be in the next
// tile. S of a kept map is read once.
//
// Sums are those of maps_gradient.h in the same order, so the results have the same bits.
#pragma once

#include "content_style_gradient.h"
#include "variants.h"

namespace mghf::cuda {

namespace {

constexpr int kStreamBlocks = 2;  // of a multiprocessor
constexpr int kStreamRegisters = (64 << 10) / (kStreamBlocks * kGradientThreads);
constexpr int kStreamDepths = kProductMaps / 8;
constexpr int kFactors = kRowTiles * kStreamDepths * kWarp;  // of each part of K's numbers

// What a block has in shared memory.
template <bool kByMaps>
struct StreamSizes {
  using Tile = MapTile<kByMaps, kGradientPixels>;
  static constexpr size_t kFixed = 2 * kFactors * sizeof(uint4) +
                                   2 * Tile::kSize * sizeof(float) + kProductMaps * sizeof(int);

  __host__ __device__ static size_t bytes(int64_t channels) {
    return kFixed + static_cast<size_t>(channels) * sizeof(StyleTerm);
  }
};

// The places of a map's pixels that a thread reads, beyond the 64 maps of TileReader.
template <class Reader, bool kByMaps>
struct StreamPlaces {
  __host__ __device__ static int number(int channels) {
    return kByMaps ? (channels + Reader::kRows - 1) / Reader::kRows
                   : (channels + kProductMaps - 1) / kProductMaps * Reader::kPasses;
  }
  __device__ static int channel(int pass) {
    return kByMaps ? Reader::map_of(pass)
                   : Reader::map_of(0) + pass / Reader::kPasses * kProductMaps;
  }
  __device__ static int pixel(int pass) {
    return Reader::pixel_of(kByMaps ? 0 : pass % Reader::kPasses);
  }
};

// `blocks`: of an image; each takes every so many-th tile.
template <class T, Reading kReading, bool kByMaps>
__global__ void __launch_bounds__(kGradientThreads, kStreamBlocks)
    stream_gradient(Image<T> sr, MutableImage<T> grad, const uint4* fragments,
                    StyleTerms<T> terms, int blocks, bool once) {
  using Reader = TileReader<T, kReading, kByMaps, kGradientPixels>;
  using Places = StreamPlaces<Reader, kByMaps>;
  using Tile = MapTile<kByMaps, kGradientPixels>;
  constexpr int kStep = Reader::kStep, kReads = Reader::kPasses / Reader::kAtOnce;
  constexpr int kAhead = kStep == 4 ? 4 : 8;
  MGHF_DYNAMIC_SHARED(uint4, factors);
  float* const features = reinterpret_cast<float*>(factors + 2 * kFactors);
  float* const product = features + Tile::kSize;
  StyleTerm* const coefficients = reinterpret_cast<StyleTerm*>(product + Tile::kSize);

  const int channels = static_cast<int>(sr.channels), pixels = static_cast<int>(sr.pixels());
  const int maps = terms.maps, depths = static_cast<int>(depths_of(maps));
  int* const kept = reinterpret_cast<int*>(coefficients + channels);
  const int block = static_cast<int>(blockIdx.x);
  const int64_t b = block / blocks;
  const int stride = blocks * kGradientPixels;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int pixel = warp % 4 * 16, half = warp / 4 * 32;

  if (thread < maps) kept[thread] = terms.kept(b, thread);
  for (int c = thread; c < channels; c += kGradientThreads) coefficients[c] = terms.of(b, c);
  const uint4* const of_image =
      fragments + b * groups_of(channels) * kRowTiles * depths * kWarp * 2;
  for (int i = thread; i < (maps + 15) / 16 * depths * kWarp; i += kGradientThreads) {
    factors[i] = of_image[i * 2];
    if (!once) factors[kFactors + i] = of_image[i * 2 + 1];
  }
  __syncthreads();

  const auto of_kept = [&](int map) { return kept[map]; };
  float next[kReads][Reader::kValues];
  const auto read_kept = [&](int first) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kReads; ++i) {
      Reader::read(next[i], sr, b, of_kept, maps, first, pixels, i * Reader::kAtOnce);
    }
  };
  float of_s[kAhead][kStep], of_g[kAhead][kStep];
  const auto read_pair = [&](int i, int pass, int first) {
    const int channel = Places::channel(pass), p = first + Places::pixel(pass);
    if (channel >= channels || p >= pixels) return;
    terms.gt.template read<kReading>(of_g[i], terms.gt.map(b, channel), p);
    if (coefficients[channel].place() < 0) {
      sr.template read<kReading>(of_s[i], sr.map(b, channel), p);
    }
  };
  const int passes = (Places::number(channels) + kAhead - 1) / kAhead * kAhead;

  int first = block % blocks * kGradientPixels;
  read_kept(first);
  MGHF_UNROLL_ALL
  for (int i = 0; i < kAhead; ++i) read_pair(i, i, first);
  MGHF_UNROLL(1)
  for (; first < pixels; first += stride) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kReads; ++i) Reader::store(features, next[i], i * Reader::kAtOnce);
    __syncthreads();
    if (half < maps) {
      float parts[2][2][4] = {};
      const auto multiply = [&](auto one_product) {
        constexpr bool kOnce = decltype(one_product)::value;
        MGHF_UNROLL(1)
        for (int k = 0; k < depths; ++k) {
          add_depth<kOnce, T, Tile>(parts, features, k, pixel, [&](int m, SplitA& a) {
            if (half + m * 16 >= maps) return false;
            const int at = ((half / 16 + m) * depths + k) * kWarp + lane;
            const uint4 big = factors[at], small = kOnce ? uint4{} : factors[kFactors + at];
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
      store_products<Tile>(product, parts, half, maps, pixel);
    }
    __syncthreads();
    if (first + stride < pixels) read_kept(first + stride);

    MGHF_UNROLL(1)
    for (int begin = 0; begin < passes; begin += kAhead) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < kAhead; ++i) {
        const int pass = begin + i;
        const int channel = Places::channel(pass), in_tile = Places::pixel(pass);
        if (channel < channels && first + in_tile < pixels) {
          const StyleTerm term = coefficients[channel];
          const int place = term.place();
          float of_product[kStep] = {}, result[kStep];
          if (place >= 0) {
            const int at = Tile::at(place, in_tile);
            if constexpr (kStep == 4) {
              load_four(of_product, product + at);
              load_four(of_s[i], features + at);
            } else {
              of_product[0] = product[at];
              of_s[i][0] = features[at];
            }
          }
          MGHF_UNROLL_ALL
          for (int k = 0; k < kStep; ++k) {
            result[k] = term.gradient(of_s[i][k], of_g[i][k], of_product[k]);
          }
          grad.template write<kReading>(result, grad.map(b, channel), first + in_tile);
        }
        const bool wraps = pass + kAhead >= passes;
        read_pair(i, wraps ? pass + kAhead - passes : pass + kAhead,
                  wraps ? first + stride : first);
      }
    }
    __syncthreads();  // the features and the product have been read
  }
}

// Blocks of an image such that the rounds of blocks that run at a time take the least, each as long
// as its tiles and about one more, for what a block reads first.
inline int64_t stream_blocks(int64_t batch, int64_t tiles, int64_t running) {
  int64_t best = 1, least = INT64_MAX;
  for (int64_t n = 1; n <= tiles && n <= running; ++n) {
    const int64_t rounds = (batch * n + running - 1) / running;
    const int64_t cost = rounds * ((tiles + n - 1) / n + 1);
    if (cost < least) best = n, least = cost;
  }
  return best;
}

// Whether stream_gradient takes such images and that many kept maps.
template <Reading kReading, class T>
bool streams(const Image<T>& sr, int64_t maps) {
  constexpr int64_t kMostChannels = 512, kMostPixels = int64_t{1} << 30;
  Gpu gpu{};
  return maps <= kProductMaps && sr.channels <= kMostChannels && sr.pixels() <= kMostPixels &&
         (sr.by_maps() ? kReading == Reading::fours : kReading == Reading::flat) &&
         newest(Variant::content_style) && current_gpu(gpu) == nullptr &&
         static_cast<int64_t>(StreamSizes<true>::bytes(kMostChannels)) <= gpu.shared_bytes;
}

template <Reading kReading, bool kByMaps, class T>
const char* launch_stream(const Image<T>& sr, const MutableImage<T>& grad, const uint4* fragments,
                          const StyleTerms<T>& terms, bool once, Stream stream) {
  const auto kernel = stream_gradient<T, kReading, kByMaps>;
  Grid grid{1, kGradientThreads, StreamSizes<kByMaps>::bytes(sr.channels)};
  grid.registers = kStreamRegisters;
  int64_t running = 0;
  const char* const error =
      running_at_a_time(reinterpret_cast<const void*>(kernel), grid, running);
  if (error != nullptr) return error;
  const int64_t tiles = (sr.pixels() + kGradientPixels - 1) / kGradientPixels;
  const int64_t blocks = stream_blocks(sr.batch, tiles, running < 1 ? 1 : running);
  grid.blocks = sr.batch * blocks;
  return launch(kernel, grid, stream, sr, grad, fragments, terms, static_cast<int>(blocks), once);
}

// For images of which streams() says so.
template <Reading kReading, class T>
const char* write_streamed(const Image<T>& sr, const MutableImage<T>& grad,
                           const uint4* fragments, const StyleTerms<T>& terms, bool once,
                           Stream stream) {
  if constexpr (kReading == Reading::fours) {
    return launch_stream<kReading, true>(sr, grad, fragments, terms, once, stream);
  }
  if constexpr (kReading == Reading::flat) {
    return launch_stream<kReading, false>(sr, grad, fragments, terms, once, stream);
  }
  return "its pixels are not side by side";
}

}  // namespace

}  // namespace mghf::cuda
