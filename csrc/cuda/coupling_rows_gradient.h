// The sub-networks' kernel for the gradient from what the forward of relu6 or leaky_relu has kept,
// for up to 64 features on GPUs with products of warpgroups (wgmma.h): what coupling_rows.h is for
// the value.
//
//     S^T(g) = E^T (A' D^T (A' P^T g))     A' 1 at a kept bit, the flat slope elsewhere
//
// has the shape of P A(D A(E f)), and a block goes through it likewise: rows of A' P^T g lie in a
// ring in shared memory, beside the packed weights, and two warpgroups take rows in turn, each of
// them making row j of the ring, then row j - 1 of D^T of it, group of channels by group, as a
// factor of the products with E^T. Rows and columns beyond the image are zeros; a pixel next to a
// border also gets what the border's own reflected windows read of it: in the rows, by taps that
// are added up when they are packed, in the columns, by values that are added up before they are
// multiplied.
//
// A gradient has any magnitude. The power of two for g is that of each pixel's largest number. For
// the second products it is the largest of these powers in the pixel's window, times a bound that
// comes with the weights, so that no value of a row has to be known before the row is made. It
// exceeds the largest value by about 2^8; of the 38 bits below it that two halves keep, 30 are
// left.
// The ring is float32 for every type of image.
#pragma once

#include "coupling_kept.h"
#include "coupling_rows_transposed.h"
#include "coupling_workspace.h"

namespace mghf::cuda {

namespace {

// One of KeptStage's steps. Where pixels are said to be by pairs, two from an even one on are
// contiguous.
template <class T>
struct KeptRows {
  KeptStage<T> stage;
  RowsPlan plan;
  float flat;                           // the activation's slope where a bit is not set
  bool clamps;
  float per_two;                        // for clamp_slope
  bool by_pairs;                        // g1 and g2
  const unsigned char* mix_transposed;  // inner, for a 1x1 mix, else null
  bool grad_x_by_pairs;                 // likewise
};

template <class T, bool kOuterOf, int kHalfOf, int kPartsOfFactor = kPartsOf<T>>
struct KeptRowsSizes {
  static constexpr bool kOuter = kOuterOf;
  static constexpr int kHalf = kHalfOf, kHidden = 2 * kHalf, kParts = kPartsOfFactor;
  static constexpr int kGroups = kHalf / kGroup, kHiddenGroups = kHidden / kGroup;
  static constexpr RowsLayout kLayout{kHalf, kParts, kGradientTapRows};
  using Row = HiddenRow<float, kHidden>;
  static constexpr int kRingBytes = kRing * Row::kSize * 4;
  static constexpr int kPowersBytes = kRing * kStrip * 4;
  static constexpr int kMixBytes = kHidden * kHidden * 2;
  static constexpr int kAllMixBytes = kParts * kMixBytes + kScaleBytes;
  static constexpr int kCounters = 2 * kRing + 1;
  static constexpr size_t kBytes =
      kLayout.bytes() + kRingBytes + kPowersBytes + kCounters * sizeof(Counter);
  static_assert(kLayout.bytes() % 16 == 0 && kLayout.scales() % 16 == 0);
  static_assert(kAllMixBytes <= kLayout.bytes());
};

// A thread's two pixels of a row, the first at an even column.
struct PixelsOfRow {
  int b, y, x;
  bool there[2];

  // Those within the image, or only those that count.
  __device__ __forceinline__ PixelsOfRow(const Tiling& tiling, const StripOfRows& strip, int row,
                                         bool counting)
      : b(strip.b), y(row), x(strip.left + opaque(PlaceInRow().pixel)) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      there[i] = counting ? strip.counts(y, x + i) : tiling.holds(y, x + i);
    }
  }
};

// What lies in memory, not yet made float: what follows a load waits for it, so that all loads of a
// row come before any conversion.
template <class T, int kCount>
struct InMemory {
  using Word = std::conditional_t<std::is_same_v<T, float>,
                                  std::conditional_t<kCount == 2, float2, float4>,
                                  std::conditional_t<kCount == 2, uint32_t, uint64_t>>;
  Word word = {};

  __device__ __forceinline__ void load(const T* from) {
    word = *reinterpret_cast<const Word*>(from);
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return i == 0 ? word.x : i == 1 ? word.y : third_or_fourth(i);
    } else {
      return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
    }
  }

 private:
  __device__ __forceinline__ float third_or_fourth(int i) const {
    if constexpr (kCount == 4) return i == 2 ? word.z : word.w;
    return 0;
  }
};

// The pixels' quads of some channels; zeros where there is no pixel or no channel. `by_pairs`: two
// pixels from an even one on are contiguous.
template <int kGroups, int kAll, class T>
__device__ __forceinline__ void read_channels(FeaturesOfRow<kAll>& to, const Channels<T>& from,
                                              const PixelsOfRow& at, bool by_pairs) {
  const Image<T>& image = from.image;
  const int own = opaque(PlaceInRow().lane) * 4;
  const T* const first =
      image.pixel(at.b, at.y, at.x) + (from.first + own) * image.channel_stride;
  const int count = at.there[0] || at.there[1] ? from.count - own : 0;
  if (by_pairs && at.there[0] && at.there[1]) {
    InMemory<T, 2> pairs[kGroups * 4];
    MGHF_UNROLL_ALL
    for (int k = 0; k < kGroups * 4; ++k) {
      const int c = k / 4 * kGroup + k % 4;
      if (c < count) pairs[k].load(first + c * image.channel_stride);
    }
    MGHF_UNROLL_ALL
    for (int k = 0; k < kGroups * 4; ++k) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) to.of[k / 4][i][k % 4] = pairs[k][i];
    }
    return;
  }
  T values[kGroups * 4][2] = {};
  MGHF_UNROLL_ALL
  for (int k = 0; k < kGroups * 4; ++k) {
    const int c = k / 4 * kGroup + k % 4;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      if (c < count && at.there[i]) {
        values[k][i] = first[c * image.channel_stride + i * image.column_stride];
      }
    }
  }
  MGHF_UNROLL_ALL
  for (int k = 0; k < kGroups * 4; ++k) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) to.of[k / 4][i][k % 4] = to_float(values[k][i]);
  }
}
// Writes the pixels' quads of a group.
template <class T>
__device__ __forceinline__ void write_channels(const MutableChannels<T>& to, const PixelsOfRow& at,
                                               bool by_pairs, int group,
                                               const float (&values)[2][4]) {
  if (by_pairs && at.there[0] && at.there[1]) {
    write_pairs(to, at.b, at.y, at.x, group, values);
    return;
  }
  const int c = group * kGroup + PlaceInRow().lane * 4;
  T* const first = to.image.pixel(at.b, at.y, at.x) + (to.first + c) * to.image.channel_stride;
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      if (!at.there[i] || c + q >= to.count) continue;
      first[q * to.image.channel_stride + i * to.image.column_stride] =
          from_float<T>(values[i][q]);
    }
  }
}

// The derivative of k tanh(x / k), k the clamp, where exp of its value is `scale`, also one that
// was rounded to zero or beyond the clamp's range. The logarithm is exact to 2^-22, which is about
// as exact as `scale`. `per_two`: r / k for r = log(2).
__device__ __forceinline__ float clamp_slope(float scale, float per_two) {
#ifdef __CUDA_ARCH__
  const float logarithm = __log2f(scale);
#else
  const float logarithm = log2f(scale);
#endif
  const float r = fminf(fmaxf(logarithm * per_two, -1.0f), 1.0f);
  return 1.0f - r * r;
}

// What goes into a sub-network in row y: d_r for rho, g1 for eta, d2 for phi; zeros beyond the
// image.
template <class Z, class T>
__device__ __forceinline__ void read_gradient(FeaturesOfRow<Z::kGroups>& to, const KeptRows<T>& r,
                                              const StripOfRows& strip, int subnet, int y) {
  const KeptStage<T>& s = r.stage;
  const PixelsOfRow at(s.tiling, strip, y, false);
  // Rows of z1 beyond the kept ones are only read for results that nobody uses.
  const bool known = !Z::kOuter || s.z1.data == nullptr ||
                     (y >= s.tiling.kept.first && y < s.tiling.kept.end);
  InMemory<T, 4> others[2][Z::kGroups], scales[2][Z::kGroups];
  const auto load = [&](int i) {
    const bool there = known && at.there[i];
    const int64_t pixel = s.tiling.pixel(at.b, y, at.x + i);
    const unsigned char* const kept = s.state.pixel(at.b, y, at.x + i);
    const T* const of_scales = State::scale<T>(kept, 0);
    const T* const from = !Z::kOuter             ? s.d2.quad(pixel, 0)
                          : s.z1.data != nullptr ? s.z1.quad(pixel, 0)
                                                 : s.state.template z1<T>(kept, 0);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      if (there) others[i][n].load(from + n * kGroup);
      if (Z::kOuter && there) scales[i][n].load(of_scales + n * kGroup);
    }
  };
  // Two pixels of float32 would need more registers than there are.
  constexpr bool kTogether = !Z::kOuter || sizeof(T) == 2;
  if constexpr (kTogether) {
    if (!Z::kOuter || subnet == kRho) load(0), load(1);
  }
  if constexpr (Z::kOuter) {
    read_channels<Z::kGroups>(to, s.g1, at, r.by_pairs);
    if (subnet != kRho) return;
  }
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    if constexpr (!kTogether) load(i);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      float(&quad)[4] = to.of[n][i];
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        if constexpr (Z::kOuter) {
          const float scale = scales[i][n][q];
          quad[q] = quad[q] * scale * others[i][n][q];
          if (r.clamps) quad[q] *= clamp_slope(scale, r.per_two);
        } else {
          quad[q] = others[i][n][q];
        }
      }
    }
  }
}

// What a result is added to: g2, for eta the sum so far, for phi g1 exp(r).
template <class Z, class T>
__device__ __forceinline__ void read_direct(FeaturesOfRow<Z::kGroups>& to, const KeptRows<T>& r,
                                            const PixelsOfRow& at, int subnet) {
  const KeptStage<T>& s = r.stage;
  if (Z::kOuter && subnet != kEta) {
    read_channels<Z::kGroups>(to, s.g2, at, r.by_pairs);
    return;
  }
  constexpr bool kAtOnce = Z::kOuter && std::is_same_v<T, float>;  // needs no conversion
  InMemory<T, 4> quads[2][Z::kGroups];
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    if (!at.there[i]) continue;
    const T* const from = Z::kOuter ? s.d2.quad(s.tiling.pixel(at.b, at.y, at.x + i), 0)
                                    : State::scale<T>(s.state.pixel(at.b, at.y, at.x + i), 0);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      if constexpr (kAtOnce) {
        read_quad(from + n * kGroup, to.of[n][i]);
      } else {
        quads[i][n].load(from + n * kGroup);
      }
    }
  }
  if constexpr (!kAtOnce) {
    if constexpr (!Z::kOuter) read_channels<Z::kGroups>(to, s.g1, at, r.by_pairs);
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      if (!at.there[i]) continue;
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          const float value = quads[i][n][q];
          to.of[n][i][q] = Z::kOuter ? value : to.of[n][i][q] * value;
        }
      }
    }
  }
}

template <class Z, class T>
__device__ __forceinline__ void write_result(Values (&result)[Z::kGroups],
                                             const FeaturesOfRow<Z::kGroups>& direct,
                                             const KeptStage<T>& s, const PixelsOfRow& at) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    if (!at.there[i]) continue;
    T* const to = (Z::kOuter ? s.d2 : s.d1).quad(s.tiling.pixel(at.b, at.y, at.x + i), 0);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      float quad[4];
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) quad[q] = result[n].at(i, q) + direct.of[n][i][q];
      write_quad(to + n * kGroup, quad);
    }
  }
}

// M^T (d1, d2) of the block's rows, for a 1x1 mix, with the packed weights in shared memory. Each
// thread has written the d1 that it reads.
template <class Z, class T>
__device__ __forceinline__ void unmix_rows(const KeptRows<T>& r, const StripOfRows& strip,
                                           const unsigned char* weights, int warpgroup) {
  const KeptStage<T>& s = r.stage;
  constexpr int kDepths = 2 * Z::kGroups;
  const float of_weights = *reinterpret_cast<const float*>(weights + Z::kMixBytes);
  FeaturesOfRow<kDepths> values = {};
  // The first turn only reads, so that the code to read is there once; its products are of zeros.
  MGHF_UNROLL(1)
  for (int y = strip.rows.first + warpgroup - 2; y < strip.rows.end; y += 2) {
    const RowFactors<kDepths, Z::kParts> factors(values);
    const PixelsOfRow next(s.tiling, strip, y + 2, true);
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const int64_t pixel = s.tiling.pixel(next.b, next.y, next.x + i);
      const T *const first = s.d1.quad(pixel, 0), *const second = s.d2.quad(pixel, 0);
      MGHF_UNROLL_ALL
      for (int n = 0; n < kDepths; ++n) {
        float quad[4] = {};
        const int group = n % Z::kGroups * kGroup;
        if (next.there[i]) read_quad((n < Z::kGroups ? first : second) + group, quad);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) values.of[n][i][q] = quad[q];
      }
    }
    const PixelsOfRow at(s.tiling, strip, y, true);
    // In two parts, so that the code to write is there once.
    MGHF_UNROLL(1)
    for (int part = 0; part < 2; ++part) {
      float sums[Z::kHalf / 2] = {};
      const auto multiply = [&](const auto& a, const unsigned char* matrix) {
        MGHF_UNROLL_ALL
        for (int n = 0; n < kDepths; ++n) {
          multiply_add_later<Z::kHalf>(sums, a[n],
                                       columns_of<Z::kHidden>(matrix, n, part * Z::kHalf));
        }
      };
      begin_products();
      if constexpr (Z::kParts == 2) {
        multiply(factors.small, weights);
        multiply(factors.big, weights + Z::kMixBytes + kScaleBytes);
      }
      multiply(factors.big, weights);
      end_products();
      wait_for_products<0>();
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        float result[2][4];
        MGHF_UNROLL_ALL
        for (int i = 0; i < 2; ++i) {
          const float back = factors.scale[i].back * of_weights;
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            result[i][q] = sums[n * kValues + q / 2 * 4 + i * 2 + q % 2] * back;
          }
        }
        write_channels(s.grad_x, at, r.grad_x_by_pairs, part * Z::kGroups + n, result);
      }
    }
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(kRowsThreads, 1) kept_rows(KeptRows<T> r) {
  if constexpr (!kWarpgroupProducts) {
    never();
  } else {
    MGHF_DYNAMIC_SHARED(unsigned char, weights);
    float* const ring = reinterpret_cast<float*>(weights + Z::kLayout.bytes());
    float* const scales = ring + kRing * Z::Row::kSize;
    Counter* const made = reinterpret_cast<Counter*>(scales + kRing * kStrip);
    Counter *const read = made + kRing, *const loaded = read + kRing;
    if (threadIdx.x == 0) {
      for (int i = 0; i < kRing; ++i) {
        made[i].begin(kWarpgroup);
        read[i].begin(kWarpgroup);
      }
      loaded->begin(1);
    }
    publish_counters();
    const KeptStage<T>& s = r.stage;
    const StripOfRows strip(s.tiling, r.plan, blockIdx.x);
    const int height = s.tiling.height;
    // A shuffle, because the compiler must see that a warp stays together: otherwise it makes
    // products one by one.
    const int warpgroup =
        __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    // Rows of the ring from here on, also those just beyond the image, each with the row of results
    // above it; beyond the last the turns are empty, so that every counter has as many rounds for
    // each sub-network.
    const int top = strip.rows.first - 1;
    const int turns = (strip.rows.end - top + 1 + kRing - 1) / kRing * kRing;
    FeaturesOfRow<Z::kGroups> gradients;
    KeptSlopesOfRow slopes;
    MGHF_UNROLL(1)
    for (int i = 0; i < (Z::kOuter ? 2 : 1); ++i) {
      if (i > 0) __syncthreads();  // the weights before are in use
      if (threadIdx.x == 0) {
        loaded->arrive(Z::kLayout.bytes());
        copy_bulk(weights, s.subnets[i].rows_gradient, Z::kLayout.bytes(), *loaded);
      }
      const int subnet = Z::kOuter ? kRho + i : kPhi, before = i * (turns / kRing);
      // The first turn only reads, so that the code to read is there once.
      MGHF_UNROLL(1)
      for (int pair = -2; pair < turns; pair += 2) {
        const int j = pair + warpgroup, y = top + j;
        if (pair == 0) loaded->wait(i % 2);
        if (pair >= 0) {
          // The last turns that read what this one replaces. The one before was waited for then.
          for (int of = j - 3; of < j - 1; ++of) {
            if (of >= 0) read[of % kRing].wait((before + of / kRing) % 2);
          }
          if (y <= strip.rows.end) {
            const typename Z::Row row{ring + j % kRing * Z::Row::kSize};
            project_row_back<Z>(row, scales + j % kRing * kStrip, gradients, weights, slopes,
                                r.flat);
          }
          made[j % kRing].arrive();
          // Row j - 2 was waited for then. A warp's windows reach into what others made.
          for (int of = j > 0 ? j - 1 : 0; of <= j; ++of) {
            made[of % kRing].wait((before + of / kRing) % 2);
          }
          if (y > strip.rows.first && y <= strip.rows.end) {
            const int of_result = y - 1;
            // Next to the image's first and last row a window of these reads the pixel twice.
            const int tap_rows[3] = {of_result == 1 ? 3 : 0, 1, of_result == height - 2 ? 3 : 2};
            const int rows[3] = {(j - 2) % kRing, (j - 1) % kRing, j % kRing};
            const PixelsOfRow at(s.tiling, strip, of_result, true);
            KeptSlopesOfRow of_first;
            of_first.read<T, Z>(s.tiling, s.state, strip, subnet, 0, of_result);
            FeaturesOfRow<Z::kGroups> direct;
            read_direct<Z>(direct, r, at, subnet);
            Values result[Z::kGroups];
            expand_row_back<Z>(result, ring, scales, rows, tap_rows, strip, s.tiling.width, weights,
                               of_first, r.flat);
            read[j % kRing].arrive();
            write_result<Z>(result, direct, s, at);
          } else {
            read[j % kRing].arrive();
          }
        }
        if (y + 2 <= strip.rows.end) {
          read_gradient<Z>(gradients, r, strip, subnet, y + 2);
          slopes.read<T, Z>(s.tiling, s.state, strip, subnet, 1, y + 2);
        }
      }
    }
    if constexpr (!Z::kOuter) {
      if (r.mix_transposed == nullptr) return;
      __syncthreads();  // phi's weights are in use
      if (threadIdx.x == 0) {
        loaded->arrive(Z::kAllMixBytes);
        copy_bulk(weights, r.mix_transposed, Z::kAllMixBytes, *loaded);
      }
      loaded->wait(1);
      unmix_rows<Z>(r, strip, weights, warpgroup);
    }
  }
}

// How the gradient is computed: by rows if the value is, but not where a side of one pixel is all
// border, or where x has more channels than the block.
inline Direction direction_back(const CouplingShape& shape, int64_t height, int64_t width,
                                bool with_state) {
  if (!with_state) return Direction::backward;
  constexpr size_t kBytes = KeptRowsSizes<float, true, kWidestRows>::kBytes;
  Gpu gpu;
  bool streams = false;
  const bool fits =
      height > 1 && width > 1 && (shape.kernel == 3 || shape.inputs <= shape.channels);
  // An error will be met again.
  if (!fits || current_gpu(gpu) != nullptr ||
      streams_rows(shape, padded_half(shape), gpu, streams) != nullptr) {
    return Direction::kept;
  }
  return streams && gpu.shared_bytes >= static_cast<int64_t>(kBytes) ? Direction::kept_rows
                                                                     : Direction::kept;
}

template <class I>
bool in_pairs(const I& image) {
  return image.column_stride == 1 && image.row_stride % 2 == 0 && image.channel_stride % 2 == 0 &&
         image.batch_stride % 2 == 0 &&
         reinterpret_cast<uintptr_t>(image.data) % (2 * sizeof(*image.data)) == 0;
}

template <class Z, class T>
const char* kept_rows_of(const KeptRows<T>& r, Stream stream) {
  return launch(kept_rows<T, Z>,
                {r.plan.blocks(r.stage.tiling.batch), kRowsThreads, Z::kBytes}, stream, r);
}
// `mix_transposed`: in the inner step for a 1x1 mix. `once`: products are one each.
template <class T, bool kOuter>
const char* launch_kept_rows(const KeptStage<T>& s, const unsigned char* mix_transposed,
                             int64_t half, bool once, Stream stream) {
  const RowsPlan plan = plan_rows(s.tiling.batch, s.tiling.computed.count(), s.tiling.width);
  const bool clamps = s.clamp > 0;
  const float per_two = clamps ? 0.69314718f / s.clamp : 0.0f;
  // g2 are channels of the same image as g1.
  const KeptRows<T> r{s,
                      plan,
                      flat_slope(s.activation),
                      clamps,
                      per_two,
                      in_pairs(s.g1.image),
                      mix_transposed,
                      in_pairs(s.grad_x.image)};
  if (once) {
    return half == 32 ? kept_rows_of<KeptRowsSizes<T, kOuter, 32, 1>>(r, stream)
                      : kept_rows_of<KeptRowsSizes<T, kOuter, 64, 1>>(r, stream);
  }
  return half == 32 ? kept_rows_of<KeptRowsSizes<T, kOuter, 32>>(r, stream)
                    : kept_rows_of<KeptRowsSizes<T, kOuter, 64>>(r, stream);
}

}  // namespace

}  // namespace mghf::cuda
