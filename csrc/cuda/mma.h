// Products of small matrices by a warp's tensor cores: d (16 x 8) += a (16 x depth) b (depth x 8),
// the sums in float32. With g = lane / 4 and t = lane % 4 a thread has
//
//     d[0..3]    rows g, g, g + 8, g + 8, columns 2 t, 2 t + 1, 2 t, 2 t + 1
//     depth 8    a[0..3]: rows g, g + 8, g, g + 8 at depths t, t, t + 4, t + 4
//                b[0..1]: column g at depths t, t + 4                              a TF32 each
//     depth 16   a[0..3]: the same rows at depths 2 t, 2 t, 2 t + 8, 2 t + 8
//                b[0..1]: column g at depths 2 t, 2 t + 8      a pair each, the next depth in the upper half
#pragma once

#include <cmath>
#include <type_traits>

#include "numbers.h"

namespace mghf::cuda {

constexpr unsigned kAllLanes = ~0u;

// Tensor cores read the sign of a TF32, its exponent and 10 bits after the point; they ignore the
// lower bits of a register.
constexpr uint32_t kBitsOfTf32 = ~uint32_t{0x1fff};

// A float32 as the sum of two TF32, exact to 2^-23 of it, in three instructions (cvt.rna.tf32 alone
// takes four). An integer addition of half of the last place that is read rounds `big` to nearest;
// an infinity stays one, and numbers too large for a TF32 become one. `small` has at most two bits
// too many, which the tensor cores ignore. `small` of a NaN is a NaN, whatever `big` is.
struct SplitTf32 {
  uint32_t big, small;

  SplitTf32() = default;
  __device__ __forceinline__ explicit SplitTf32(float x)
      : big(bits_as<uint32_t>(x) + 0x1000),
        small(bits_as<uint32_t>(x - bits_as<float>(big & kBitsOfTf32))) {}
};

// The nearest TF32 of a float32, in the bits that are read. A NaN is left as it is: with nothing
// beside `big` the addition would turn some of them into numbers.
__device__ __forceinline__ uint32_t nearest_tf32(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  return x == x ? bits + 0x1000 : bits;
}

// Likewise by truncation: one instruction less, exact to 2^-20.
struct CutTf32 {
  uint32_t big, small;

  __device__ __forceinline__ explicit CutTf32(float x)
      : big(bits_as<uint32_t>(x)),
        small(bits_as<uint32_t>(x - bits_as<float>(big & kBitsOfTf32))) {}
};

// Two neighbouring numbers, each as the sum of two bfloat16: a float32 to about 2^-17 of it.
struct alignas(8) SplitPair {
  uint32_t big, small;

  SplitPair() = default;
  __device__ __forceinline__ SplitPair(float first, float second)
      : big(pair_of<BFloat16>(first, second)),
        small(pair_of<BFloat16>(first - bits_as<float>(big << 16),
                                second - bits_as<float>(big & 0xffff0000))) {}
};

#if !defined(__CUDACC__)
namespace host_mma {

MGHF_UNWATCHED inline double power_of_two(int exponent) {
  return __builtin_bit_cast(double, static_cast<uint64_t>(1023 + exponent) << 52);
}
// floor(log2(|x|)), for x neither 0 nor subnormal: products of two subnormal float32 are not.
MGHF_UNWATCHED inline int exponent_of(double x) {
  return static_cast<int>(__builtin_bit_cast(uint64_t, x) >> 52 & 0x7ff) - 1023;
}
// Rounds towards zero, to that many binary places; few bits are left.
MGHF_UNWATCHED inline double cut_off(double x, int places) {
  const auto whole = static_cast<int64_t>(x * power_of_two(places));
  return static_cast<double>(whole) * power_of_two(-places);
}

// The sum as a tensor core computes it, without rounding to nearest. Products are exact; all
// addends are truncated one bit below the last place of the largest, and the sum at its own last
// place. (Volta keeps no bit below, Hopper two or three: Fasi, Higham, Mikaitis and Pranesh, 2021.)
MGHF_UNWATCHED inline float add_up(float before, const double* products, int count) {
  double largest = std::fabs(before), exact = before;
  for (int i = 0; i < count; ++i) {
    const double size = std::fabs(products[i]);
    largest = size > largest ? size : largest;
    exact += products[i];
  }
  if (!__builtin_isfinite(exact) || exact == 0) return static_cast<float>(exact);
  const int places = 24 - exponent_of(largest);
  double sum = cut_off(before, places);
  for (int i = 0; i < count; ++i) sum += cut_off(products[i], places);
  if (sum == 0) return 0;
  const int own = 23 - exponent_of(sum);
  return static_cast<float>(cut_off(sum, own < 149 ? own : 149));
}

// `number(word, i)`: the i-th number of a word, of which there are `kPacked`. A tensor core adds up
// 4 products of TF32 at a time, 8 of halves. What it reads is the thread's own or was exchanged, so
// ThreadSanitizer need not watch.
template <int kPacked, class Number>
MGHF_UNWATCHED void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 Number number) {
  float own[6][kPacked];
  for (int p = 0; p < kPacked; ++p) {
    for (int i = 0; i < 4; ++i) own[i][p] = number(a[i], p);
    for (int i = 0; i < 2; ++i) own[4 + i][p] = number(b[i], p);
  }
  const unsigned char* const all = host::exchange(own, sizeof own);
  const int g = static_cast<int>(threadIdx.x) % 32 / 4, t = static_cast<int>(threadIdx.x) % 4;
  // Word i of row g, and word i % 2 of column 2 t + i / 2.
  double rows[4][4 * kPacked], columns[4][4 * kPacked];
  for (int i = 0; i < 4; ++i) {
    for (int n = 0; n < 4 * kPacked; ++n) {
      const int lane = n / kPacked, p = n % kPacked;
      const unsigned char* const row = all + (g * 4 + lane) * host::kMostExchanged;
      const unsigned char* const column = all + ((2 * t + i / 2) * 4 + lane) * host::kMostExchanged;
      float of_row, of_column;
      std::memcpy(&of_row, row + (i * kPacked + p) * 4, 4);
      std::memcpy(&of_column, column + ((4 + i % 2) * kPacked + p) * 4, 4);
      rows[i][n] = static_cast<double>(of_row);
      columns[i][n] = static_cast<double>(of_column);
    }
  }
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      double products[4 * kPacked];
      for (int n = 0; n < 4 * kPacked; ++n) {
        products[n] = rows[i / 2 + 2 * half][n] * columns[i % 2 * 2 + half][n];
      }
      d[i] = add_up(d[i], products, 4 * kPacked);
    }
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
    return bits_as<float>(word & kBitsOfTf32);
  });
#endif
}

// Products of pairs of T: Half or BFloat16.
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

// Loads four matrices of 8 rows of 16 bytes from shared memory: to[m] becomes the thread's part of
// matrix m as a factor of pairs, word t of row g. `row`: row lane % 8 of matrix lane / 8. It is one
// instruction whose results are registers in the order that products need.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const uint4* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const unsigned char* const all = host::exchange(&row, sizeof row);
  for (unsigned m = 0; m < 4; ++m) {
    const unsigned char* from;
    std::memcpy(&from, all + (m * 8 + g) * host::kMostExchanged, sizeof from);
    std::memcpy(&to[m], from + 4 * t, 4);
  }
#endif
}

// Loads four matrices like load_matrices, but each transposed: to[m] has column g of rows
// 2 t and 2 t + 1.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const uint4* row) {
#ifdef __CUDA_ARCH__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#elif !defined(__CUDACC__)
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const unsigned char* const all = host::exchange(&row, sizeof row);
  for (unsigned m = 0; m < 4; ++m) {
    uint32_t halves[2];
    for (unsigned k = 0; k < 2; ++k) {
      const uint16_t* from;
      std::memcpy(&from, all + (m * 8 + 2 * t + k) * host::kMostExchanged, sizeof from);
      halves[k] = from[g];
    }
    to[m] = halves[0] | halves[1] << 16;
  }
#endif
}

// By three products of TF32. The omitted fourth is 2^-22 of the largest addend.
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

// Omits the products of small parts that are zeros.
template <bool kExactA, bool kExactB>
__device__ __forceinline__ void mma_split(float (&d)[4], const SplitA& a, const SplitB& b) {
  if constexpr (!kExactA) mma_tf32(d, a.small, b.big);
  if constexpr (!kExactB) mma_tf32(d, a.big, b.small);
  mma_tf32(d, a.big, b.big);
}

struct TripleTf32 {
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    mma_tf32(d, a, b);
  }
};
struct TripleBFloat16 {
  static __device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4],
                                                      const uint32_t (&b)[2]) {
    mma_pairs<BFloat16>(d, a, b);
  }
};

// sums[i][first + j] += a[i] b[j], added outside the tensor cores, with rounding: they truncate at
// each addition, so a sum of a thousand products would be wrong by 1e-5. The products of all i and
// j come between two additions to the same numbers. kOnce: one product, of the big parts.
template <class Products, bool kExactA, bool kOnce = false, int kRows, int kSome, int kAll>
__device__ __forceinline__ void add_products(float (&sums)[kRows][kAll][4], int first,
                                             const SplitA (&a)[kRows], const SplitB (&b)[kSome]) {
  float d[kRows][kSome][4] = {};
  MGHF_UNROLL_ALL
  for (int term = kOnce ? 2 : kExactA ? 1 : 0; term < 3; ++term) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRows; ++i) {
      MGHF_UNROLL_ALL
      for (int j = 0; j < kSome; ++j) {
        Products::multiply_add(d[i][j], term == 0 ? a[i].small : a[i].big,
                               term == 1 ? b[j].small : b[j].big);
      }
    }
  }
  MGHF_UNROLL_ALL
  for (int i = 0; i < kRows; ++i) {
    MGHF_UNROLL_ALL
    for (int j = 0; j < kSome; ++j) {
      MGHF_UNROLL_ALL
      for (int k = 0; k < 4; ++k) sums[i][first + j][k] += d[i][j][k];
    }
  }
}

}  // namespace mghf::cuda
