// The weights of a sub-network as the kernel of rows has them in shared memory (coupling_rows.h),
// one piece of memory for each; those of the mix (coupling_mix_rows.h) likewise, its matrix and
// what undoes the power of two:
//
//     E, then P   as columns of halves in the cores of wgmma.h: [8 depths][8 columns] of 128 bytes,
//                 in the order of channels of coupling_products.h; of float32 the big parts
//     D           [tap][channel], float32, times a power of two: its results are factors of P
//     what undoes the powers of two by which E, and P and D, are multiplied, and the largest sum of
//                 the magnitudes of a channel's taps, times D's
//     E, then P   of float32 the small parts, last, so that a kernel of one product copies what is
//                 before them
//
// For the gradient (coupling_rows_gradient.h) P^T is in the place of E, E^T in that of P, and D^T
// in that of D: as it is, its taps turned around, then the sum of its first and last row. In place
// of the largest sum is a power of two by which the largest of D^T A' P^T g can exceed that of g.
#pragma once

#include "coupling_products.h"
#include "halves.h"

namespace mghf::cuda {

namespace {

constexpr int kWidestRows = 64;       // features of a sub-network
constexpr float kHiddenScale = 2048;  // 6 times it is within 2^13 ... 2^14
constexpr int kScaleBytes = 128;      // what undoes powers of two, padded to what cores take
constexpr int kGradientTapRows = 4;

struct RowsLayout {
  int half, parts;   // parts: 2 for float32, big and small; 1 is the beginning of these
  int tap_rows = 3;  // kGradientTapRows for the gradient

  __host__ __device__ constexpr int hidden() const { return 2 * half; }
  __host__ __device__ constexpr int matrix_bytes() const { return half * hidden() * 2; }
  __host__ __device__ constexpr int second() const { return matrix_bytes(); }
  __host__ __device__ constexpr int taps() const { return 2 * matrix_bytes(); }
  __host__ __device__ constexpr int tap_count() const { return 3 * tap_rows; }
  __host__ __device__ constexpr int scales() const { return taps() + tap_count() * hidden() * 4; }
  // From a matrix's big part to its small one.
  __host__ __device__ constexpr int to_small() const { return scales() + kScaleBytes; }
  __host__ __device__ constexpr int bytes() const {
    return to_small() + (parts - 1) * 2 * matrix_bytes();
  }
};
// Parts of a factor that are packed, and that products in float32 take.
template <class T>
constexpr int kPartsOf = std::is_same_v<T, float> ? 2 : 1;

// The channel within its group at a place among the depths or columns of a product.
__device__ __forceinline__ int channel_at(int place) {
  return place % 8 / 2 * 4 + place / 8 * 2 + place % 2;
}

// A sub-network to be packed, for the value or for the gradient.
struct RowsSubnet {
  Matrix first, second;  // E and P, or P^T and E^T
  const float* depthwise;
  int hidden;  // channels that exist
  RowsLayout layout;
  unsigned char* to;

  __device__ bool for_gradient() const { return layout.tap_rows == kGradientTapRows; }
};

// A matrix of a mix to be packed, in so many parts.
struct RowsMix {
  Matrix matrix;
  int parts;
  unsigned char* to;
};

// Each matrix is packed by some blocks: two for each sub-network, and those of mixes.
struct RowsPacking {
  static constexpr int kBlocks = 8;
  RowsSubnet subnets[6];
  RowsMix mixes[2];
  int count, mix_count;  // of sub-networks, of mixes

  int64_t blocks() const { return int64_t{2 * count + mix_count} * kBlocks; }
};

// Groups of terms that the kernel of the mix has room for, or 0 if it takes none so many.
// With 8 for 32 features nvcc spills.
constexpr int kFewDepths = 2;
template <int kHalf>
constexpr int kManyDepths = kHalf == 32 ? 4 : 8;
inline int64_t mix_depths(int64_t terms, int64_t kernel, int64_t half) {
  if (half > kWidestRows) return 0;
  if (terms <= kFewDepths * kGroup) return kFewDepths;
  const int64_t many = half == 32 ? kManyDepths<32> : kManyDepths<64>;
  return kernel == 1 && terms <= many * kGroup ? many : 0;
}

// The largest of all threads' numbers.
template <int kThreads>
__device__ __forceinline__ float largest_of_block(float largest) {
  __shared__ float of_warps[kThreads / kWarp];
  for (int other = kWarp / 2; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
  }
  __syncthreads();  // those of a call before have been read
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (const float of_warp : of_warps) largest = fmaxf(largest, of_warp);
  return largest;
}

template <int kThreads>
__device__ __forceinline__ float largest_weight(const Matrix& m) {
  const int64_t places = m.k.pieces * m.k.padded, columns = m.n.pieces * m.n.padded;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < places * columns; i += kThreads) {
    const int64_t n = m.n.offset(i / places), k = m.k.offset(i % places);
    const float weight = n >= 0 && k >= 0 ? fabsf(m.from[n + k]) : 0.0f;
    if (weight <= 3.402823466e38f) largest = fmaxf(largest, weight);
  }
  return largest_of_block<kThreads>(largest);
}

// The power of two by which the largest of D^T A' P^T g, divided by 2, can exceed the largest of g.
// Next to the image's borders a tap counts up to four times.
template <int kThreads>
__device__ __forceinline__ float hidden_bound(const RowsSubnet& subnet) {
  const Matrix& m = subnet.first;
  const int places = static_cast<int>(m.k.pieces * m.k.padded);
  float largest = 0;
  for (int channel = threadIdx.x; channel < subnet.hidden; channel += kThreads) {
    const float* const row = m.from + m.n.offset(channel);
    float of_row = 0, of_taps = 0;
    for (int place = 0; place < places; ++place) {
      const int64_t k = m.k.offset(place);
      if (k >= 0) of_row += fabsf(row[k]);
    }
    for (int tap = 0; tap < 9; ++tap) of_taps += fabsf(subnet.depthwise[channel * 9 + tap]);
    largest = fmaxf(largest, of_taps * of_row);
  }
  constexpr uint32_t kFurther = 2, kMost = 253;  // up to a power of two, and from four halved
  const uint32_t exponent = bits_as<uint32_t>(largest_of_block<kThreads>(largest)) >> 23 & 0xff;
  return bits_as<float>((exponent + kFurther < kMost ? exponent + kFurther : kMost) << 23);
}

// The largest sum of the magnitudes of a channel's taps, times D's power of two.
template <int kThreads>
__device__ __forceinline__ float largest_sum_of_taps(const RowsSubnet& subnet) {
  float largest = 0;
  for (int channel = threadIdx.x; channel < subnet.hidden; channel += kThreads) {
    float sum = 0;
    for (int tap = 0; tap < 9; ++tap) sum += fabsf(subnet.depthwise[channel * 9 + tap]);
    largest = fmaxf(largest, sum);
  }
  return largest_of_block<kThreads>(largest) * kHiddenScale;
}

template <int kThreads>
__device__ __forceinline__ void pack_rows(const RowsPacking& packing, int block) {
  const int part = block % RowsPacking::kBlocks, which = block / RowsPacking::kBlocks;
  const bool is_mix = which >= 2 * packing.count, is_second = which % 2 != 0;
  const RowsSubnet& subnet = packing.subnets[is_mix ? 0 : which / 2];
  const RowsLayout& layout = subnet.layout;
  const RowsMix& mix = packing.mixes[is_mix ? which - 2 * packing.count : 0];
  const int parts = is_mix ? mix.parts : layout.parts;
  const Matrix& m = is_mix ? mix.matrix : is_second ? subnet.second : subnet.first;
  const PowerOfTwo scale(largest_weight<kThreads>(m));
  const int columns = static_cast<int>(m.n.pieces * m.n.padded);
  const int units = static_cast<int>(m.k.pieces * m.k.padded) / 8 * columns;
  unsigned char* const to =
      is_mix ? mix.to : subnet.to + (is_second ? layout.second() : 0);
  const int to_small = is_mix ? units + kScaleBytes / 16 : layout.to_small() / 16;
  for (int i = part * kThreads + static_cast<int>(threadIdx.x); i < units;
       i += RowsPacking::kBlocks * kThreads) {
    // Eight depths of a column are 16 bytes, neighbouring columns too.
    const int depths = i / columns, column = i % columns;
    const int64_t n = m.n.offset(column / kGroup * kGroup + channel_at(column % kGroup));
    SplitHalves pairs[4];
    MGHF_UNROLL_ALL
    for (int pair = 0; pair < 4; ++pair) {
      float w[2];
      MGHF_UNROLL_ALL
      for (int q = 0; q < 2; ++q) {
        const int depth = depths % 2 * 8 + pair * 2 + q;
        const int64_t k = m.k.offset(depths / 2 * kGroup + channel_at(depth));
        w[q] = n >= 0 && k >= 0 ? m.from[n + k] * scale.by : 0.0f;
      }
      pairs[pair] = SplitHalves(w[0], w[1]);
    }
    uint4* const unit = reinterpret_cast<uint4*>(to) + i;
    *unit = {pairs[0].big, pairs[1].big, pairs[2].big, pairs[3].big};
    if (parts == 2) {
      unit[to_small] = {pairs[0].small, pairs[1].small, pairs[2].small, pairs[3].small};
    }
  }
  if (part != 0) return;
  if (is_mix) {
    uint4* const after = reinterpret_cast<uint4*>(to) + units;
    float* const back = reinterpret_cast<float*>(after);
    if (threadIdx.x < kScaleBytes / 4) back[threadIdx.x] = scale.back;
    return;
  }
  // Even ones are written beside E, odd ones beside P.
  float* const scales = reinterpret_cast<float*>(subnet.to + layout.scales());
  const bool for_gradient = subnet.for_gradient();
  if (is_second) {
    const float further = for_gradient ? 1.0f : 1 / kHiddenScale;
    if (threadIdx.x < kScaleBytes / 8) scales[2 * threadIdx.x + 1] = scale.back * further;
    return;
  }
  const float bound =
      for_gradient ? hidden_bound<kThreads>(subnet) : largest_sum_of_taps<kThreads>(subnet);
  if (threadIdx.x < kScaleBytes / 8) {
    scales[2 * threadIdx.x] = threadIdx.x == 0 ? scale.back : bound;
  }
  float* const taps = reinterpret_cast<float*>(subnet.to + layout.taps());
  for (int i = threadIdx.x; i < layout.tap_count() * layout.hidden(); i += kThreads) {
    const int channel = i % layout.hidden(), tap = i / layout.hidden();
    const float* const of = subnet.depthwise + channel * 9;
    float weight = 0;
    if (channel >= subnet.hidden) {
      // There is none.
    } else if (!for_gradient) {
      weight = of[tap] * kHiddenScale;
    } else {
      weight = tap < 9 ? of[8 - tap] : of[17 - tap] + of[11 - tap];
    }
    taps[i] = weight;
  }
}

}  // namespace

}  // namespace mghf::cuda
