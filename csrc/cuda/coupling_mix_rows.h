// The mix of channels on GPUs with products of warpgroups (wgmma.h): 64 pixels at a time stream
// past weights that stay in shared memory. A thread reads the terms of two pixels, those of the
// next 64 while the products run, and writes features where its results lie.
//
// Predicted for float32, a 1x1 mix of 128 channels, 512 x 512 pixels, on an H200: 24 products
// m64n128k16 of 64 cycles for 64 pixels, 1,536 cycles of tensor cores, 31 times a multiprocessor:
// 0.03 ms. Memory, 268 MB at 4.3 TB/s, takes 0.06 ms and is the bound; with a stem of 27 terms 137
// MB, 0.03 ms.
#pragma once

#include "bulk.h"
#include "coupling_mix.h"
#include "coupling_rows_factors.h"

namespace mghf::cuda {

namespace {

constexpr int kMixRowsPixels = 64;

template <class T>
struct MixRows {
  Mix<T, T> mix;
  const unsigned char* weights;
  bool by_pairs;  // whether two neighbouring pixels, from an even one on, are contiguous
};

// kDepths: groups of terms.
template <class T, int kKernelOf, int kDepthsOf, int kHalfOf, int kPartsOfFactor>
struct MixRowsSizes {
  static constexpr int kKernel = kKernelOf, kDepths = kDepthsOf, kColumns = 2 * kHalfOf;
  static constexpr int kGroups = kColumns / kGroup, kParts = kPartsOfFactor;
  // Three have 168 registers a thread. A warp alone waits for its terms most of the time.
  static constexpr int kWarpgroups = kDepths <= kFewDepths ? 3 : 2;
  static constexpr int kThreads = kWarpgroups * kWarpgroup;
  static constexpr int kMatrixBytes = kDepths * kGroup * kColumns * 2;
  static constexpr int kWeightBytes = kParts * kMatrixBytes + kScaleBytes;
  static constexpr size_t kBytes = kWeightBytes + sizeof(Counter);
};

// A thread's terms of pixels.
template <class T, class Z>
struct TermsOfPixels {
  static constexpr bool kWindow = Z::kKernel == 3;
  int64_t offsets[kWindow ? Z::kDepths : 1][4];  // of each term from the pixel's first one
  unsigned taps[kWindow ? Z::kDepths : 1][4];    // bits, 0 for a term that does not exist

  __device__ __forceinline__ explicit TermsOfPixels(const MixRows<T>& m) {
    if constexpr (kWindow) {
      const Image<T>& image = m.mix.x.image;
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kDepths; ++n) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          const int term = n * kGroup + PlaceInRow().lane * 4 + q, tap = term % kTaps;
          offsets[n][q] = term / kTaps * image.channel_stride + (tap / 3 - 1) * image.row_stride +
                          (tap % 3 - 1) * image.column_stride;
          taps[n][q] = term < m.mix.terms ? 1u << tap : 0;
        }
      }
    }
  }

  __device__ __forceinline__ void read(FeaturesOfRow<Z::kDepths>& to, const MixRows<T>& m,
                                       int first) const {
    if constexpr (kWindow) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        const MixSource<T, 3> from(m.mix, first + i);
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kDepths; ++n) {
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            to.of[n][i][q] =
                (from.known & taps[n][q]) != 0 ? to_float(from.at[offsets[n][q]]) : 0.0f;
          }
        }
      }
    } else if (m.by_pairs && first < m.mix.pixels) {
      const MixSource<T, 1> from(m.mix, first);
      const int64_t stride = m.mix.x.image.channel_stride;
      const int lane = PlaceInRow().lane;
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kDepths; ++n) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          const int c = n * kGroup + lane * 4 + q;
          const bool exists = c < m.mix.x.count;
          read_pair(exists ? from.at + c * stride : nullptr, to.of[n][0][q], to.of[n][1][q]);
        }
      }
    } else {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        const MixSource<T, 1> from(m.mix, first + i);
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kDepths; ++n) from.read(m.mix, n, to.of[n][i]);
      }
    }
  }

  // Zeros from null.
  static __device__ __forceinline__ void read_pair(const T* from, float& first, float& second) {
    first = second = 0;
    if (from == nullptr) return;
    if constexpr (std::is_same_v<T, float>) {
      const float2 pair = *reinterpret_cast<const float2*>(from);
      first = pair.x, second = pair.y;
    } else {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
      first = to_float(T{static_cast<uint16_t>(pair)});
      second = to_float(T{static_cast<uint16_t>(pair >> 16)});
    }
  }
};

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 1) mix_rows(MixRows<T> m) {
  if constexpr (!kWarpgroupProducts) {
    never();
  } else {
    MGHF_DYNAMIC_SHARED(unsigned char, weights);
    Counter* const loaded = reinterpret_cast<Counter*>(weights + Z::kWeightBytes);
    if (threadIdx.x == 0) loaded->begin(1);
    publish_counters();
    if (threadIdx.x == 0) {
      loaded->arrive(Z::kWeightBytes);
      copy_bulk(weights, m.weights, Z::kWeightBytes, *loaded);
    }
    const PlaceInRow place;
    // A shuffle, so that the compiler sees that a warp stays together.
    const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    const TermsOfPixels<T, Z> terms(m);
    const int step = static_cast<int>(gridDim.x) * Z::kWarpgroups * kMixRowsPixels;
    // The first turn only reads, so that the code to read is there once; its products are of zeros.
    int first = (static_cast<int>(blockIdx.x) * Z::kWarpgroups + warpgroup) * kMixRowsPixels - step;
    FeaturesOfRow<Z::kDepths> values = {};
    loaded->wait(0);
    const float of_weights = *reinterpret_cast<const float*>(weights + Z::kMatrixBytes);
    MGHF_UNROLL(1)
    for (; first < m.mix.pixels; first += step) {
      const RowFactors<Z::kDepths, Z::kParts> factors(values);
      float sums[Z::kColumns / 2] = {};
      const auto multiply = [&](const auto& a, const unsigned char* matrix) {
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kDepths; ++n) {
          multiply_add_later<Z::kColumns>(sums, a[n], columns_of<Z::kColumns>(matrix, n, 0));
        }
      };
      begin_products();
      if constexpr (Z::kParts == 2) {
        multiply(factors.small, weights);
        multiply(factors.big, weights + Z::kMatrixBytes + kScaleBytes);
      }
      multiply(factors.big, weights);
      end_products();
      const int next = m.mix.pixels - first > step ? first + step : m.mix.pixels;
      terms.read(values, m, next + place.pixel);
      wait_for_products<0>();
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        const int pixel = first + place.pixel + i;
        if (pixel < 0 || pixel >= m.mix.pixels) continue;
        const MixPixel at(pixel, m.mix.height, m.mix.width);
        T* const to = m.mix.result.image.pixel(at.b, at.y, at.x) + place.lane * 4;
        const float back = factors.scale[i].back * of_weights;
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kGroups; ++n) {
          float quad[4];
          read_quad(m.mix.bias + n * kGroup + place.lane * 4, quad);
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            quad[q] += sums[n * kValues + q / 2 * 4 + i * 2 + q % 2] * back;
          }
          write_quad(to + n * kGroup, quad);
        }
      }
    }
  }
}

template <int kKernel, int kDepths, int kHalf, int kParts, class T>
const char* mix_rows_of(const MixRows<T>& m, Stream stream) {
  constexpr int64_t kMultiprocessors = 132;
  using Z = MixRowsSizes<T, kKernel, kDepths, kHalf, kParts>;
  constexpr int64_t kPixels = Z::kWarpgroups * kMixRowsPixels;
  const int64_t blocks = (m.mix.pixels + kPixels - 1) / kPixels;
  return launch(mix_rows<T, Z>,
                {blocks < kMultiprocessors ? blocks : kMultiprocessors, Z::kThreads, Z::kBytes},
                stream, m);
}

template <int kHalf, int kParts, class T>
const char* mix_rows_of(const MixRows<T>& m, int64_t kernel, int64_t depths, Stream stream) {
  if (kernel == 3) return mix_rows_of<3, kFewDepths, kHalf, kParts>(m, stream);
  return depths == kFewDepths ? mix_rows_of<1, kFewDepths, kHalf, kParts>(m, stream)
                              : mix_rows_of<1, kManyDepths<kHalf>, kHalf, kParts>(m, stream);
}

// All features of a 1x1 or 3x3 mix, whose terms fill at most `depths` groups, from mix_depths().
// `once`: products are one each.
template <class T>
const char* launch_mix_rows(const Mix<T, T>& mix, const unsigned char* weights, int64_t kernel,
                            int64_t depths, int64_t half, bool once, Stream stream) {
  const Image<T>& x = mix.x.image;
  const bool by_pairs = x.column_stride == 1 && x.width % 2 == 0 && x.row_stride % 2 == 0 &&
                        x.channel_stride % 2 == 0 && x.batch_stride % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(x.data) % (2 * sizeof(T)) == 0;
  const MixRows<T> m{mix, weights, by_pairs};
  if (once) {
    return half == 32 ? mix_rows_of<32, 1>(m, kernel, depths, stream)
                      : mix_rows_of<64, 1>(m, kernel, depths, stream);
  }
  return half == 32 ? mix_rows_of<32, kPartsOf<T>>(m, kernel, depths, stream)
                    : mix_rows_of<64, kPartsOf<T>>(m, kernel, depths, stream);
}

}  // namespace

}  // namespace mghf::cuda
