// The two steps of coupling_rows_gradient.h for a row: A' P^T g into a ring in shared memory, and
// E^T A' D^T of the ring's rows.
#pragma once

#include "coupling_rows.h"

namespace mghf::cuda {

namespace {

// The bits of a layer of a row. Of a thread's two pixels a lane of four has the words of one pair
// of groups, as SlopesOfRow left them.
struct KeptSlopesOfRow {
  uint32_t words[2] = {};

  // Zeros where there is no pixel.
  template <class T, class Z>
  __device__ __forceinline__ void read(const Tiling& tiling, const State& state,
                                       const StripOfRows& strip, int subnet, int layer, int y) {
    const PlaceInRow place;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const int x = strip.left + place.pixel + i;
      words[i] = 0;
      if (place.lane >= Z::kHiddenGroups / 2 || !tiling.holds(y, x)) continue;
      const unsigned char* const from =
          state.template slopes<T>(state.pixel(strip.b, y, x), subnet) +
          layer * (slope_bytes(Z::kHalf) / 2) + place.lane * 4;
      words[i] = *reinterpret_cast<const uint32_t*>(from);
    }
  }
  // The bits of a group at a thread's channels, from bit 0 on for its first pixel and from bit 16
  // on for its second. All threads of a warp call it.
  __device__ __forceinline__ uint32_t of(int group) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp / 4 * 4 + group / 2;
    const uint32_t first = __shfl_sync(kAllLanes, words[0], lane);
    const uint32_t second = __shfl_sync(kAllLanes, words[1], lane);
    const int place = group % 2 * 16 + PlaceInRow().lane * 4;
    return (first >> place & 0xf) | (second >> place & 0xf) << 16;
  }
};

// A row of A' P^T g into its place in the ring, with what undoes its pixels' powers of two.
template <class Z>
__device__ __forceinline__ void project_row_back(const typename Z::Row& row, float* scales,
                                                 const FeaturesOfRow<Z::kGroups>& gradients,
                                                 const unsigned char* weights,
                                                 const KeptSlopesOfRow& slopes, float flat) {
  const PlaceInRow place;
  const RowFactors<Z::kGroups, Z::kParts> factors(gradients);
  const HiddenSums<Z> sums(factors, weights);
  if (place.lane == 0) {
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) scales[place.pixel + i] = factors.scale[i].back;
  }
  const float of_weights = *reinterpret_cast<const float*>(weights + Z::kLayout.scales());
  const float back[2] = {factors.scale[0].back * of_weights, factors.scale[1].back * of_weights};
  MGHF_UNROLL_ALL
  for (int part = 0; part < 2; ++part) {
    sums.wait_for(part);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      const int group = part * Z::kGroups + n;
      const uint32_t bits = slopes.of(group);
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          quad[q] = sums.of[part][n * kValues + q / 2 * 4 + i * 2 + q % 2] * back[i];
          // Not together with `back`, which may be as small as a float can be. Also by zero, for a
          // NaN.
          if ((bits >> (i * 16 + q) & 1) == 0) quad[q] *= flat;
        }
        write_quad(row.data + Z::Row::offset(place.pixel + i) + group * kGroup, quad);
      }
    }
  }
}

// A column that a thread's windows reach, within the strip: beyond it another one, for results that
// do not count.
__device__ __forceinline__ int column_of_window(int pixel, int i) {
  const int at = pixel + i - 1;
  return at < 0 ? 0 : at < kStrip ? at : kStrip - 1;
}

// The columns that a thread's windows reach, and what is different at the image's borders.
template <class Row>
struct TransposedColumns {
  int of[4];                 // as offsets in a row of the ring
  bool at_border;            // whether the following may be true in the warp
  bool no_left, no_right;    // whether the window's outer columns lie beyond the image
  bool of_first, of_second;  // whether a pixel is next to the last column

  // `pixel`: the thread's first one in the strip.
  __device__ __forceinline__ TransposedColumns(const StripOfRows& strip, int width, int pixel) {
    const int x = strip.left + pixel;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) of[i] = Row::offset(column_of_window(pixel, i));
    no_left = x == 0;
    no_right = x + 2 >= width;
    of_first = x == width - 2;
    of_second = x + 1 == width - 2;
    const int of_warp = __shfl_sync(kAllLanes, x, 0);
    at_border = of_warp == 0 || of_warp + kGroup + 1 >= width;
  }

  // Makes a row's four columns two windows of three: columns 0 to 2, and `second`, then 2 and 3.
  // An image's second pixel gets in its window's last column also what the first pixel has, the
  // last but one in its window's first column what the last pixel has.
  __device__ __forceinline__ void reflect(float (&columns)[4][4], float (&second)[4]) const {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) second[q] = columns[1][q];
    if (!at_border) return;
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      const float left = no_left ? 0.0f : columns[0][q];
      const float right = no_right ? 0.0f : columns[3][q];
      columns[0][q] = left + (of_first ? columns[2][q] : 0.0f);
      second[q] += of_second ? right : 0.0f;
      columns[3][q] = right + (no_left ? columns[1][q] : 0.0f);
    }
  }
};

// Powers of two for the second products, of a thread's two pixels.
struct WindowScales {
  float by[2], back[2];

  // `scales`: of the pixels of each row of the ring.
  __device__ __forceinline__ WindowScales(const float* scales, const int (&rows)[3], int pixel,
                                          float bound) {
    float largest[4] = {};
    MGHF_UNROLL_ALL
    for (int x = 0; x < 4; ++x) {
      MGHF_UNROLL_ALL
      for (int y = 0; y < 3; ++y) {
        const int at = rows[y] * kStrip + column_of_window(pixel, x);
        largest[x] = fmaxf(largest[x], scales[at]);
      }
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      constexpr int kOne = 127, kMost = 2 * kOne - 1;
      const float of_window = fmaxf(fmaxf(largest[i], largest[i + 1]), largest[i + 2]);
      const int sum = static_cast<int>(bits_as<uint32_t>(of_window) >> 23) +
                      static_cast<int>(bits_as<uint32_t>(bound) >> 23) - kOne;
      const int exponent = sum < 1 ? 1 : sum < kMost ? sum : kMost;
      back[i] = bits_as<float>(static_cast<uint32_t>(exponent) << 23);
      by[i] = bits_as<float>(static_cast<uint32_t>(2 * kOne - exponent) << 23);
    }
  }
};

// result = E^T A' D^T for a row whose window's rows are in the ring, at `rows`, with `tap_rows`.
template <class Z>
__device__ __forceinline__ void expand_row_back(Values (&result)[Z::kGroups], const float* ring,
                                                const float* scales, const int (&rows)[3],
                                                const int (&tap_rows)[3],
                                                const StripOfRows& strip, int width,
                                                const unsigned char* weights,
                                                const KeptSlopesOfRow& slopes, float flat) {
  const PlaceInRow place;
  const float* const taps =
      reinterpret_cast<const float*>(weights + Z::kLayout.taps()) + place.lane * 4;
  const unsigned char* const matrix = weights + Z::kLayout.second();
  const float* const of_weights = reinterpret_cast<const float*>(weights + Z::kLayout.scales());
  // Opaque, because the compiler would keep what follows from it all the time.
  const int pixel = opaque(place.pixel);
  const TransposedColumns<typename Z::Row> columns(strip, width, pixel);
  const WindowScales scale(scales, rows, pixel, of_weights[2]);
  ResultSums<Z> sums;
  MGHF_UNROLL(1)
  for (int first = 0; first < Z::kHiddenGroups; first += 2) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int group = first + k;
      Values inner = {};
      MGHF_UNROLL_ALL
      for (int y = 0; y < 3; ++y) {
        float w[3][4];
        MGHF_UNROLL_ALL
        for (int tap = 0; tap < 3; ++tap) {
          read_quad(taps + (tap_rows[y] * 3 + tap) * Z::kHidden + group * kGroup, w[tap]);
        }
        float window[4][4], second[4];
        MGHF_UNROLL_ALL
        for (int x = 0; x < 4; ++x) {
          read_quad(ring + (rows[y] * Z::Row::kSize + columns.of[x]) + group * kGroup, window[x]);
        }
        columns.reflect(window, second);
        MGHF_UNROLL_ALL
        for (int tap = 0; tap < 3; ++tap) {
          MGHF_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            inner.at(0, q) += w[tap][q] * window[tap][q];
            inner.at(1, q) += w[tap][q] * (tap == 0 ? second[q] : window[tap + 1][q]);
          }
        }
      }
      const uint32_t bits = slopes.of(group);
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        // Values of pixel i % 2, channels i / 2 * 2 and the next.
        float pair_of_values[2];
        MGHF_UNROLL_ALL
        for (int e = 0; e < 2; ++e) {
          const bool steep = (bits >> (i % 2 * 16 + i / 2 * 2 + e) & 1) != 0;
          pair_of_values[e] = inner.at(i % 2, i / 2 * 2 + e) *
                              (steep ? scale.by[i % 2] : scale.by[i % 2] * flat);
        }
        sums.set(group, i, pair_of_values[0], pair_of_values[1]);
      }
      sums.multiply(group, matrix);
    }
  }
  const float back[2] = {scale.back[0] * of_weights[1], scale.back[1] * of_weights[1]};
  sums.finish(result, back);
}

}  // namespace

}  // namespace mghf::cuda
