// The two products of a row of hidden values with packed weights, which the value (coupling_rows.h)
// and the gradient (coupling_rows_transposed.h) have alike. Z says the sizes.
#pragma once

#include "coupling_rows_factors.h"

namespace mghf::cuda {

namespace {

// What E makes of a row's features, or P^T of its gradients, times powers of two: in two parts of
// the hidden channels, so that one can be used while the other is made.
template <class Z>
struct HiddenSums {
  float of[2][Z::kHalf / 2];

  __device__ __forceinline__ HiddenSums(const RowFactors<Z::kGroups, Z::kParts>& factors,
                                        const unsigned char* weights) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < Z::kHalf; ++k) {
      // Opaque, because the compiler would set the zeros amid the products and wait for them first.
      of[k / (Z::kHalf / 2)][k % (Z::kHalf / 2)] = bits_as<float>(opaque(0));
    }
    begin_products();
    MGHF_UNROLL_ALL
    for (int part = 0; part < 2; ++part) {
      const auto multiply = [&](const auto& a, const unsigned char* matrix) {
        MGHF_UNROLL_ALL
        for (int n = 0; n < Z::kGroups; ++n) {
          multiply_add_later<Z::kHalf>(of[part], a[n],
                                       columns_of<Z::kHidden>(matrix, n, part * Z::kHalf));
        }
      };
      if constexpr (Z::kParts == 2) {
        multiply(factors.small, weights);
        multiply(factors.big, weights + Z::kLayout.to_small());
      }
      multiply(factors.big, weights);
      end_products();
    }
  }
  __device__ __forceinline__ void wait_for(int part) const {
    if (part == 0) {
      wait_for_products<1>();
    } else {
      wait_for_products<0>();
    }
  }
};

// What P makes of a row of hidden values, or E^T of their gradients, times powers of two: added up
// group by group of the hidden channels, with the factors of one group made while those of another
// are multiplied.
template <class Z>
struct ResultSums {
  float sums[Z::kHalf / 2] = {}, small_sums[Z::kHalf / 2] = {};
  uint32_t big[2][4], small[2][4];

  // The pair of factors that lies in register i of the group's.
  __device__ __forceinline__ void set(int group, int i, float first, float second) {
    const SplitHalves pair(first, second);
    big[group % 2][i] = pair.big;
    small[group % 2][i] = pair.small;
  }
  // Multiplies by the group's rows of the matrix, while the next group is made.
  __device__ __forceinline__ void multiply(int group, const unsigned char* matrix) {
    begin_products();
    const SharedColumns of_big = columns_of<Z::kHalf>(matrix, group, 0);
    if constexpr (Z::kParts == 2) {
      multiply_add_later<Z::kHalf>(small_sums, small[group % 2], of_big);
      multiply_add_later<Z::kHalf>(small_sums, big[group % 2],
                                   of_big.further(Z::kLayout.to_small()));
    }
    multiply_add_later<Z::kHalf>(sums, big[group % 2], of_big);
    end_products();
    wait_for_products<1>();  // then the factors of the group before may be overwritten
  }
  // `back`: what undoes the powers of two of a thread's two pixels.
  __device__ __forceinline__ void finish(Values (&result)[Z::kGroups], const float (&back)[2]) {
    wait_for_products<0>();
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      MGHF_UNROLL_ALL
      for (int k = 0; k < kValues; ++k) {
        const int at = n * kValues + k;
        const float sum = Z::kParts == 2 ? sums[at] + small_sums[at] : sums[at];
        result[n].all()[k] = sum * back[k % 4 / 2];
      }
    }
  }
};

}  // namespace

}  // namespace mghf::cuda
