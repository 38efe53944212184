// Products of small matrices by a warp's tensor cores: d (16 x 8) += a (16 x depth) b (depth x 8), the
// sums in float32. With g = lane / 4 and t = lane % 4 a thread has
//
//     d[0..3]    rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, 2 t, 2 t + 1
//     depth 8    a[0..3]: rows g, g + 8, g, g + 8 at depths t, t, t + 4, t + 4
//                b[0..1]: column g at depths t, t + 4                              a TF32 each
//     depth 16   a[0..3]: the same rows at depths 2 t, 2 t, 2 t + 8, 2 t + 8
//                b[0..1]: column g at depths 2 t, 2 t + 8      a pair each, the next depth in the upper half
#pragma once

#include <type_traits>

#include "numbers.h"

namespace mghf::cuda {

constexpr unsigned kAllLanes = ~0u;

// A float32 rounded to the 10 bits that a TF32 has after the point.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef __CUDA_ARCH__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
#endif
}

// A float32 as the sum of two TF32, exact to 2^-22 of it.
struct SplitTf32 {
  uint32_t big, small;

  SplitTf32() = default;
  __device__ __forceinline__ explicit SplitTf32(float x)
      : big(to_tf32(x)), small(to_tf32(x - bits_as<float>(big))) {}
};

// Likewise by cutting off what a TF32 does not have, as tensor cores do with a float32 that they
// get: fewer instructions, exact to 2^-20.
struct CutTf32 {
  uint32_t big, small;

  __device__ __forceinline__ explicit CutTf32(float x)
      : big(bits_as<uint32_t>(x)),
        small(bits_as<uint32_t>(x - bits_as<float>(big & ~uint32_t{0x1fff}))) {}
};

// Two numbers, the first in the lower half, rounded to T.
template <class T>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

#if !defined(__CUDACC__)
namespace host_mma {

struct Operands {
  uint32_t a[4], b[2];
};

// `number(word, i)`: the i-th number of a word, of which there are `kPacked`.
template <int kPacked, class Number>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Number number) {
  const Operands own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned char* const all = host::exchange(&own, sizeof own);
  Operands of[host::kWarp];
  for (int lane = 0; lane < host::kWarp; ++lane) {
    std::memcpy(&of[lane], all + lane * host::kMostExchanged, sizeof own);
  }
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * t + i % 2;
    float sum = d[i];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 4; ++k) {
        for (int p = 0; p < kPacked; ++p) {
          sum += number(of[g * 4 + k].a[upper + 2 * half], p) *
                 number(of[column * 4 + k].b[half], p);
        }
      }
    }
    d[i] = sum;
  }
}

}  // namespace host_mma
#endif

__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif !defined(__CUDACC__)
  host_mma::multiply_add<1>(d, a, b, [](uint32_t word, int) {
    return bits_as<float>(word & ~uint32_t{0x1fff});  // the rest is not looked at
  });
#endif
}

// Of pairs of T: Half or BFloat16.
template <class T>
__device__ __forceinline__ void mma_pairs(float (&d)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#elif !defined(__CUDACC__)
  host_mma::multiply_add<2>(d, a, b, [](uint32_t word, int i) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * i))});
  });
#endif
}

// By three products of TF32: exact to about 2^-21 of the largest of what is added up.
struct SplitA {
  uint32_t big[4], small[4];
};
struct SplitB {
  uint32_t big[2], small[2];
};
__device__ __forceinline__ void mma_3xtf32(float (&d)[4], const SplitA& a, const SplitB& b) {
  mma_tf32(d, a.small, b.big);
  mma_tf32(d, a.big, b.small);
  mma_tf32(d, a.big, b.big);
}

// Whether all numbers of a type are TF32, so that they have no small part.
template <class T>
constexpr bool exact_in_tf32 = !std::is_same_v<T, float>;

// Without the products of small parts that are zeros.
template <bool kExactA, bool kExactB>
__device__ __forceinline__ void mma_split(float (&d)[4], const SplitA& a, const SplitB& b) {
  if constexpr (!kExactA) mma_tf32(d, a.small, b.big);
  if constexpr (!kExactB) mma_tf32(d, a.big, b.small);
  mma_tf32(d, a.big, b.big);
}

}  // namespace mghf::cuda
