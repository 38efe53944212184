// Building blocks of the kernels of `coupling`: blocks of 16 pixels by 16 channels in the registers
// of a warp, tiles of pixels in shared memory, products of the blocks with packed weights.
//
// With g = lane / 4 and t = lane % 4 a thread has the channels 4 t ... 4 t + 3 of the pixels 2 g
// and 2 g + 1. A product takes and gives blocks in this order: the assignment of pixels to rows of
// the tensor cores' matrices, and of channels to depths or columns, is free, as long as the weights
// are packed accordingly. So the result of one product goes into the next without an exchange
// between threads, four channels are read and written at once, and the 3x3 windows of a thread's
// pixels overlap.
#pragma once

#include "mma.h"

namespace mghf::cuda {

constexpr int kGroup = 16;  // channels of a block, and pixels

// A thread's part of a block.
struct Values {
  float of[2][4];

  __device__ __forceinline__ float& at(int pixel, int channel) {
    return of[channel / 2][pixel * 2 + channel % 2];
  }
  __device__ __forceinline__ float* all() { return &of[0][0]; }
};
constexpr int kValues = 8;

// Four neighbours in memory, aligned to all four.
template <class T>
__device__ __forceinline__ void read_quad(const T* from, float (&to)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    const float4 quad = *reinterpret_cast<const float4*>(from);
    to[0] = quad.x, to[1] = quad.y, to[2] = quad.z, to[3] = quad.w;
  } else {
    const uint64_t quad = *reinterpret_cast<const uint64_t*>(from);
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) to[i] = to_float(T{static_cast<uint16_t>(quad >> (16 * i))});
  }
}
template <class T>
__device__ __forceinline__ void write_quad(T* to, const float (&from)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<float4*>(to) = float4{from[0], from[1], from[2], from[3]};
  } else {
    const uint64_t low = pair_of<T>(from[0], from[1]), high = pair_of<T>(from[2], from[3]);
    *reinterpret_cast<uint64_t*>(to) = low | high << 32;
  }
}

// ---- tiles ----

// [pixel][channel] in shared memory. A quarter of a warp, or half of it where a quad is 8 bytes,
// reads or writes quads of pixels 2 apart. To spread these over all banks, the groups of a pixel
// are permuted, and the even ones of 4 or 8 pixels are stored before the odd ones.
template <class T, int kTileChannels>
struct Tile {
  static constexpr int kChannels = kTileChannels;
  T* data;

  // The number of elements of that many pixels.
  static constexpr int size(int pixels) { return (pixels + 7) / 8 * 8 * kChannels; }

  __device__ __forceinline__ T* group(int pixel, int group) const {
    constexpr int kGroups = kChannels / kGroup;
    constexpr int kBanks = 128 / (kGroup * static_cast<int>(sizeof(T)));  // in groups
    constexpr int kPlaces = kGroups < kBanks ? kGroups : kBanks;
    constexpr int kPixels = kBanks / kPlaces;  // in the banks
    static_assert((kPlaces & (kPlaces - 1)) == 0 && kGroups % kPlaces == 0);
    const int place = group ^ (pixel / 2 / kPixels % kPlaces);
    const int at = pixel / (2 * kPixels) * (2 * kPixels) + pixel % 2 * kPixels + pixel / 2 % kPixels;
    return data + at * kChannels + place * kGroup;
  }
  __device__ __forceinline__ void read(int pixel, int of_group, float (&to)[4]) const {
    read_quad(group(pixel, of_group) + threadIdx.x % 4 * 4, to);
  }
  __device__ __forceinline__ void write(int pixel, int of_group, const float (&from)[4]) const {
    write_quad(group(pixel, of_group) + threadIdx.x % 4 * 4, from);
  }
  // This thread's part of the block whose pixels begin at `pixel` for it.
  __device__ __forceinline__ Values block(int pixel, int of_group) const {
    Values values;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      float quad[4];
      read(pixel + i, of_group, quad);
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) values.at(i, q) = quad[q];
    }
    return values;
  }
};

// ---- the factors of products ----

// A product of blocks takes kSteps steps, each with its own factor from the values and kLoads loads
// of packed weights for each lane.

// float32 by three products of TF32: sums exact to about 2^-21 of the largest term.
struct ExactFloats {
  static constexpr int kSteps = 2, kLoads = 2;
  using Factor = SplitA;
  static __device__ __forceinline__ Factor factor(const Values& v, int step) {
    constexpr int kOrder[4] = {0, 2, 1, 3};
    Factor factor;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      const SplitTf32 x(v.of[step][kOrder[i]]);
      // Opaque, because otherwise the compiler splits again for every product.
      factor.big[i] = opaque(x.big);
      factor.small[i] = opaque(x.small);
    }
    return factor;
  }
  // The factor of a single product.
  static __device__ __forceinline__ void nearest(uint32_t (&to)[4], const Values& v, int step) {
    constexpr int kOrder[4] = {0, 2, 1, 3};
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) to[i] = opaque(nearest_tf32(v.of[step][kOrder[i]]));
  }
  // w[e][q]: column e of this lane at depth q.
  static __device__ __forceinline__ void pack(const float (&w)[2][4], int step,
                                              uint4 (&to)[kLoads]) {
    MGHF_UNROLL_ALL
    for (int e = 0; e < 2; ++e) {
      const float first = w[e][2 * step], second = w[e][2 * step + 1];
      to[e] = {nearest_tf32(first), nearest_tf32(second), SplitTf32(first).small,
               SplitTf32(second).small};
    }
  }
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};

// float32 by three products of bfloat16: exact to about 2^-16, in half of the time.
struct FastFloats {
  static constexpr int kSteps = 1, kLoads = 2;
  using Factor = SplitA;
  static __device__ __forceinline__ Factor factor(const Values& v, int) {
    Factor factor;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      const SplitPair x(v.of[i / 2][i % 2 * 2], v.of[i / 2][i % 2 * 2 + 1]);
      factor.big[i] = x.big;
      factor.small[i] = x.small;
    }
    return factor;
  }
  static __device__ __forceinline__ void nearest(uint32_t (&to)[4], const Values& v, int) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      to[i] = pair_of<BFloat16>(v.of[i / 2][i % 2 * 2], v.of[i / 2][i % 2 * 2 + 1]);
    }
  }
  static __device__ __forceinline__ void pack(const float (&w)[2][4], int, uint4 (&to)[kLoads]) {
    MGHF_UNROLL_ALL
    for (int e = 0; e < 2; ++e) {
      const SplitPair x(w[e][0], w[e][1]), y(w[e][2], w[e][3]);
      to[e] = {x.big, y.big, x.small, y.small};
    }
  }
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    mma_pairs<BFloat16>(d, a, b);
  }
};

// Factors rounded to T.
template <class T>
struct Halves {
  static constexpr int kSteps = 1, kLoads = 1;
  struct Factor {
    uint32_t pairs[4];
  };
  static __device__ __forceinline__ Factor factor(const Values& v, int) {
    Factor factor;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      factor.pairs[i] = pair_of<T>(v.of[i / 2][i % 2 * 2], v.of[i / 2][i % 2 * 2 + 1]);
    }
    return factor;
  }
  static __device__ __forceinline__ void pack(const float (&w)[2][4], int, uint4 (&to)[kLoads]) {
    to[0] = {pair_of<T>(w[0][0], w[0][1]), pair_of<T>(w[0][2], w[0][3]),
             pair_of<T>(w[1][0], w[1][1]), pair_of<T>(w[1][2], w[1][3])};
  }
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    mma_pairs<T>(d, a, b);
  }
};

// The step of d += a b for some blocks of pixels.
template <class P, int kCount>
__device__ __forceinline__ void multiply_step(Values (&d)[kCount],
                                              const typename P::Factor (&a)[kCount],
                                              const uint4 (&b)[P::kLoads]) {
  if constexpr (P::kLoads == 1) {
    const uint32_t columns[2][2] = {{b[0].x, b[0].y}, {b[0].z, b[0].w}};
    MGHF_UNROLL_ALL
    for (int i = 0; i < kCount; ++i) {
      MGHF_UNROLL_ALL
      for (int e = 0; e < 2; ++e) P::multiply_add(d[i].of[e], a[i].pairs, columns[e]);
    }
  } else {
    // In this order two additions to the same sums are as far apart as possible.
    MGHF_UNROLL_ALL
    for (int term = 0; term < 3; ++term) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < kCount; ++i) {
        MGHF_UNROLL_ALL
        for (int e = 0; e < 2; ++e) {
          const uint32_t big[2] = {b[e].x, b[e].y}, small[2] = {b[e].z, b[e].w};
          P::multiply_add(d[i].of[e], term == 0 ? a[i].small : a[i].big, term == 1 ? small : big);
        }
      }
    }
  }
}

// In the forward, and where the gradient recomputes it, less exact products would move activations
// across their kinks. In the gradient itself they are exact enough.
template <class T>
using Exact = std::conditional_t<std::is_same_v<T, float>, ExactFloats, Halves<T>>;
template <class T>
using Fast = std::conditional_t<std::is_same_v<T, float>, FastFloats, Halves<T>>;

// ---- packed weights ----

// A packed matrix. `once`: its products with float32 are one each, of the nearest neighbours in the
// type of the products, instead of three.
struct Packed {
  const uint4* at;
  bool once;

  __host__ __device__ operator const uint4*() const { return at; }
};

// An axis of `pieces` with `padded` places each, of which `count` exist, but not more than `all`
// together.
struct Axis {
  int64_t pieces, count, padded, stride, all = INT64_MAX;

  __host__ __device__ int64_t groups() const { return pieces * padded / kGroup; }
  // The offset of a place, or -1.
  __device__ int64_t offset(int64_t place) const {
    const int64_t i = place % padded, at = place / padded * count + i;
    return i < count && at < all ? at * stride : -1;
  }
};

// A matrix of n columns by k depths: blocks [group of k][group of n][step][load][lane].
struct Matrix {
  const float* from;
  Axis n, k;
  uint4* to;
  bool fast;

  __host__ __device__ int64_t blocks() const { return n.groups() * k.groups(); }
};

template <class P>
__device__ __forceinline__ void pack_block(const Matrix& m, int64_t block) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  float w[2][4];
  MGHF_UNROLL_ALL
  for (int e = 0; e < 2; ++e) {
    const int64_t n = m.n.offset(block % m.n.groups() * kGroup + g / 2 * 4 + e * 2 + g % 2);
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      const int64_t k = m.k.offset(block / m.n.groups() * kGroup + t * 4 + q);
      w[e][q] = n >= 0 && k >= 0 ? m.from[n + k] : 0.0f;
    }
  }
  MGHF_UNROLL_ALL
  for (int step = 0; step < P::kSteps; ++step) {
    uint4 packed[P::kLoads];
    P::pack(w, step, packed);
    MGHF_UNROLL_ALL
    for (int i = 0; i < P::kLoads; ++i) {
      m.to[((block * P::kSteps + step) * P::kLoads + i) * kWarp + lane] = packed[i];
    }
  }
}

// sum[n] += values times a block of weights, for each group n < `groups` of results, starting at
// the block `first`; here by one product each.
template <class P, int kGroups, int kCount>
__device__ __forceinline__ void multiply_add_once(Values (&sum)[kGroups][kCount],
                                                  const Values (&values)[kCount],
                                                  const uint4* weights, int first, int groups) {
  const uint4* const block =
      weights + first * (P::kSteps * P::kLoads * kWarp) + threadIdx.x % kWarp;
  MGHF_UNROLL_ALL
  for (int step = 0; step < P::kSteps; ++step) {
    uint32_t a[kCount][4];
    MGHF_UNROLL_ALL
    for (int i = 0; i < kCount; ++i) P::nearest(a[i], values[i], step);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      if (n >= groups) continue;
      MGHF_UNROLL_ALL
      for (int e = 0; e < P::kLoads; ++e) {
        const uint4 both = block[((n * P::kSteps + step) * P::kLoads + e) * kWarp];
        const uint32_t b[2] = {both.x, both.y};
        MGHF_UNROLL_ALL
        for (int i = 0; i < kCount; ++i) P::multiply_add(sum[n][i].of[e], a[i], b);
      }
    }
  }
}

// The same, as precise as the weights ask for.
template <class P, int kGroups, int kCount>
__device__ __forceinline__ void multiply_add(Values (&sum)[kGroups][kCount],
                                             const Values (&values)[kCount], const Packed& weights,
                                             int first, int groups = kGroups) {
  if constexpr (P::kLoads == 2) {
    if (weights.once) return multiply_add_once<P>(sum, values, weights, first, groups);
  }
  const uint4* const block =
      weights.at + first * (P::kSteps * P::kLoads * kWarp) + threadIdx.x % kWarp;
  MGHF_UNROLL_ALL
  for (int step = 0; step < P::kSteps; ++step) {
    typename P::Factor a[kCount];
    MGHF_UNROLL_ALL
    for (int i = 0; i < kCount; ++i) a[i] = P::factor(values[i], step);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      if (n >= groups) continue;
      uint4 b[P::kLoads];
      MGHF_UNROLL_ALL
      for (int i = 0; i < P::kLoads; ++i) {
        b[i] = block[((n * P::kSteps + step) * P::kLoads + i) * kWarp];
      }
      multiply_step<P>(sum[n], a, b);
    }
  }
}

// The same for sums of more than 128 products of float32, added outside the tensor cores, which
// truncate at every addition. Halves and gradients, which are less exact anyway, stay inside.
template <class P, int kGroups, int kCount>
__device__ __forceinline__ void multiply_add_outside(Values (&sum)[kGroups][kCount],
                                                     const Values (&values)[kCount],
                                                     const Packed& weights, int first,
                                                     int groups = kGroups) {
  if constexpr (!std::is_same_v<P, ExactFloats>) {
    multiply_add<P>(sum, values, weights, first, groups);
    return;
  } else {
    if (weights.once) return multiply_add_once<P>(sum, values, weights, first, groups);
    const uint4* const block =
        weights.at + first * (P::kSteps * P::kLoads * kWarp) + threadIdx.x % kWarp;
    typename P::Factor a[P::kSteps][kCount];
    MGHF_UNROLL_ALL
    for (int step = 0; step < P::kSteps; ++step) {
      MGHF_UNROLL_ALL
      for (int i = 0; i < kCount; ++i) a[step][i] = P::factor(values[i], step);
    }
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      if (n >= groups) continue;
      Values d[kCount] = {};
      MGHF_UNROLL_ALL
      for (int step = 0; step < P::kSteps; ++step) {
        uint4 b[P::kLoads];
        MGHF_UNROLL_ALL
        for (int i = 0; i < P::kLoads; ++i) {
          b[i] = block[((n * P::kSteps + step) * P::kLoads + i) * kWarp];
        }
        multiply_step<P>(d, a[step], b);
      }
      MGHF_UNROLL_ALL
      for (int i = 0; i < kCount; ++i) {
        MGHF_UNROLL_ALL
        for (int k = 0; k < kValues; ++k) sum[n][i].all()[k] += d[i].all()[k];
      }
    }
  }
}

}  // namespace mghf::cuda
