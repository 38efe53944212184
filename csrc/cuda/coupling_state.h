// What the forward of `coupling` keeps of every pixel for its gradient: exp(r), for a 1x1 mix z1,
// and for each of the six hidden layers (phi's, rho's, eta's; expand's, then the 3x3 one's) a bit
// for each channel, set where the activation has slope 1. Channels are padded as features are.
#pragma once

#include "coupling_geometry.h"
#include "coupling_pointwise.h"

namespace mghf::cuda {

namespace {

enum Subnet { kPhi, kRho, kEta };

// Bytes of a sub-network's bits: two layers of 2 kHalf channels.
__host__ __device__ constexpr int slope_bytes(int half) { return half / 2; }

// Bytes of a pixel, a multiple of 16.
int64_t state_bytes(int64_t half, int64_t bytes_of_element, int64_t kernel) {
  return (kernel == 1 ? 2 : 1) * half * bytes_of_element + 3 * slope_bytes(static_cast<int>(half));
}

// Byte is const for reading. `data` is null where nothing is kept.
template <class Byte>
struct StateOf {
  Byte* data;  // of the first image
  int height, width, half;
  int bytes;  // of a pixel
  bool has_z1;

  __device__ Byte* pixel(int b, int y, int x) const {
    return data + ((static_cast<int64_t>(b) * height + y) * width + x) * bytes;
  }
  // A thread's quad of exp(r) or of z1.
  template <class T>
  static __device__ auto scale(Byte* pixel, int group) {
    using Element = std::conditional_t<std::is_const_v<Byte>, const T, T>;
    return reinterpret_cast<Element*>(pixel) + group * kGroup + threadIdx.x % 4 * 4;
  }
  template <class T>
  __device__ auto z1(Byte* pixel, int group) const {
    return scale<T>(pixel + half * sizeof(T), group);
  }
  // The bits of a sub-network, [layer][group].
  template <class T>
  __device__ Byte* slopes(Byte* pixel, int subnet) const {
    return pixel + (has_z1 ? 2 : 1) * half * sizeof(T) + subnet * slope_bytes(half);
  }
};
using State = StateOf<const unsigned char>;
using MutableState = StateOf<unsigned char>;

// The bits of a sub-network in shared memory: [pixel][layer][group], a bit for each channel of a
// group.
template <int kHalf>
struct Slopes {
  static constexpr int kWords = 2 * kHalf / kGroup;  // of a layer
  static constexpr int kBytes = slope_bytes(kHalf);  // of a pixel
  static constexpr int kCopies = kBytes / 16;
  uint16_t* words;

  __device__ __forceinline__ uint16_t& word(int pixel, int layer, int group) const {
    return words[(pixel * 2 + layer) * kWords + group];
  }
  __device__ __forceinline__ unsigned char* copy(int pixel, int part) const {
    return reinterpret_cast<unsigned char*>(words) + pixel * kBytes + part * 16;
  }
  // Makes `quad`, a gradient at this thread's channels, the one before the activation.
  __device__ __forceinline__ void go_back(float (&quad)[4], int pixel, int layer, int group,
                                          float flat) const {
    const unsigned bits = word(pixel, layer, group) >> (threadIdx.x % 4 * 4);
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) quad[q] *= (bits >> q & 1) != 0 ? 1.0f : flat;
  }
};

// The bits of a block's channels at a thread's two pixels, those of the second in the upper half.
// All threads of a warp call it. `six`: where relu6 ends, if x has another scale.
__device__ __forceinline__ uint32_t slope_bits(Values& x, bool relu6, float six = 6) {
  uint32_t bits = 0;
  MGHF_UNROLL_ALL
  for (int pixel = 0; pixel < 2; ++pixel) {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      bits |= static_cast<uint32_t>(is_steep(x.at(pixel, q), relu6, six)) << (pixel * kGroup + q);
    }
  }
  bits <<= opaque(static_cast<int>(threadIdx.x)) % 4 * 4;
  bits |= __shfl_xor_sync(kAllLanes, bits, 1);
  return bits | __shfl_xor_sync(kAllLanes, bits, 2);
}

}  // namespace

}  // namespace mghf::cuda
