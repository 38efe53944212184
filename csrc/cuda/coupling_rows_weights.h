// The weights of a sub-network as the kernel of rows has them in shared memory (coupling_rows.h),
// one piece of memory for each; those of the mix (coupling_mix_rows.h) likewise, its matrix and
// what undoes the power of two:
//
//     E, then P   as columns of halves in the cores of wgmma.h: [8 depths][8 columns] of 128 bytes,
//                 in the order of channels of coupling_products.h; of float32 the big parts
//     D           [tap][channel], float32, times a power of two: its results are factors of P
//     what undoes the powers of two by which E, and P and D, are multiplied
//     E, then P   of float32 the small parts, last, so that a kernel of one product copies what is
//                 before them
#pragma once

#include "coupling_products.h"
#include "halves.h"

namespace mghf::cuda {

namespace {

constexpr int kWidestRows = 64;       // features of a sub-network
constexpr float kHiddenScale = 2048;  // 6 times it is within 2^13 ... 2^14
constexpr int kScaleBytes = 128;      // what undoes powers of two, padded to what cores take

struct RowsLayout {
  int half, parts;  // parts: 2 for float32, big and small; 1 is the beginning of these

  __host__ __device__ constexpr int hidden() const { return 2 * half; }
  __host__ __device__ constexpr int matrix_bytes() const { return half * hidden() * 2; }
  __host__ __device__ constexpr int project() const { return matrix_bytes(); }
  __host__ __device__ constexpr int taps() const { return 2 * matrix_bytes(); }
  __host__ __device__ constexpr int scales() const { return taps() + 9 * hidden() * 4; }
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

// A sub-network to be packed.
struct RowsSubnet {
  Matrix expand, project;
  const float* depthwise;
  int hidden;  // channels that exist
  unsigned char* to;
};

// Each matrix is packed by some blocks: two for each sub-network, and that of the mix.
struct RowsPacking {
  static constexpr int kBlocks = 8;
  RowsSubnet subnets[3];
  RowsLayout layout;
  int count;  // of sub-networks
  Matrix mix;
  unsigned char* to_mix;
  bool with_mix;

  int64_t blocks() const { return int64_t{2 * count + (with_mix ? 1 : 0)} * kBlocks; }
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

template <int kThreads>
__device__ __forceinline__ float largest_weight(const Matrix& m) {
  __shared__ float of_warps[kThreads / kWarp];
  const int64_t places = m.k.pieces * m.k.padded, columns = m.n.pieces * m.n.padded;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < places * columns; i += kThreads) {
    const int64_t n = m.n.offset(i / places), k = m.k.offset(i % places);
    const float weight = n >= 0 && k >= 0 ? fabsf(m.from[n + k]) : 0.0f;
    if (weight <= 3.402823466e38f) largest = fmaxf(largest, weight);
  }
  for (int other = kWarp / 2; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, other));
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = largest;
  __syncthreads();
  for (const float of_warp : of_warps) largest = fmaxf(largest, of_warp);
  return largest;
}

template <int kThreads>
__device__ __forceinline__ void pack_rows(const RowsPacking& packing, int block) {
  const int part = block % RowsPacking::kBlocks, which = block / RowsPacking::kBlocks;
  const bool is_mix = which == 2 * packing.count, is_project = which % 2 != 0;
  const RowsSubnet& subnet = packing.subnets[is_mix ? 0 : which / 2];
  const RowsLayout& layout = packing.layout;
  const Matrix& m = is_mix ? packing.mix : is_project ? subnet.project : subnet.expand;
  const PowerOfTwo scale(largest_weight<kThreads>(m));
  const int columns = static_cast<int>(m.n.pieces * m.n.padded);
  const int units = static_cast<int>(m.k.pieces * m.k.padded) / 8 * columns;
  unsigned char* const to =
      is_mix ? packing.to_mix : subnet.to + (is_project ? layout.project() : 0);
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
    if (layout.parts == 2) {
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
  float* const scales = reinterpret_cast<float*>(subnet.to + layout.scales());
  if (threadIdx.x < kScaleBytes / 8) {
    scales[2 * threadIdx.x + (is_project ? 1 : 0)] =
        is_project ? scale.back * (1 / kHiddenScale) : scale.back;
  }
  if (is_project) return;
  float* const taps = reinterpret_cast<float*>(subnet.to + layout.taps());
  for (int i = threadIdx.x; i < 9 * layout.hidden(); i += kThreads) {
    const int channel = i % layout.hidden(), tap = i / layout.hidden();
    taps[i] = channel < subnet.hidden ? subnet.depthwise[channel * 9 + tap] * kHiddenScale : 0.0f;
  }
}

}  // namespace

}  // namespace mghf::cuda
