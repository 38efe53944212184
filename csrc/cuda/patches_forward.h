// The forward's kernel of `patches`; see patches.cu.
#pragma once

#include "patches_geometry.h"

namespace mghf::cuda {

namespace {

// A block takes 128 rows through both layers. The first is a product in slices of 16 pixels of the
// patches: two slices of the patches and of W1 in shared memory, one being copied while the tensor
// cores multiply the other. Three products of TF32 each, two for images of half precision, whose
// pixels are exact in one, or one if no more is asked for. Sums of products of 8 pixels are added
// up outside the tensor cores. The hidden layer, 128 units at a time, stays in shared memory for
// the second layer; y is summed up in the embedding's memory, each number by one thread, and
// divided at the end.
//
// Predicted: reads x (134 MB, 31 us) and of W1 462 MB from the second-level cache, writes 15.6 MB
// (4 us). R 128 (1024 + 64) = 7.86 G multiply-adds by three products: 47 GFLOP, 157 us. An SM has
// two blocks at a time; of 441 the busiest of 132 SMs get four, on average they get 3.3: about 190
// us.

constexpr int kPixels = 8 * kStepsOfSlice;  // of a slice
constexpr int kHiddenPitch = kColumns + 4;

// A piece of an image in shared memory: [row][pixel], or [pixel][row] where maps run fastest.
template <class T, bool kMaps>
struct Slice {
  static constexpr int kLine = kMaps ? kRows + 8 : kPixels + 16 / static_cast<int>(sizeof(T));
  static constexpr int kBytes = (kMaps ? kPixels : kRows) * kLine * static_cast<int>(sizeof(T));

  __device__ static constexpr int at(int row, int pixel) {
    return kMaps ? pixel * kLine + row : row * kLine + pixel;
  }
};

constexpr int kWeightsOfSlice = kStepsOfSlice * kTilesOfGroup * kWarp;
constexpr int kWeightBytes = kWeightsOfSlice * static_cast<int>(sizeof(uint4));
constexpr int kHiddenBytes = kRows * kHiddenPitch * static_cast<int>(sizeof(float));

template <class T, bool kMaps>
constexpr int project_bytes() {
  const int stages = 2 * (Slice<T, kMaps>::kBytes + kWeightBytes);
  return stages > kHiddenBytes ? stages : kHiddenBytes;
}

using Sums = float[kRowTiles][kColumnTiles][4];

// Adds a slice's product to a warp's sums; `columns`: how many of the warp's 64 exist.
template <class T, bool kMaps, bool kOnce>
__device__ __forceinline__ void multiply_slice(Sums& sums, const T* pixels, const uint4* weights,
                                               const ThreadPlace& place, int columns) {
  using At = Slice<T, kMaps>;
  const uint4* const packed = weights + place.warp_column / 8 * kWarp + threadIdx.x % kWarp;
  MGHF_UNROLL(1)
  for (int step = 0; step < kStepsOfSlice; ++step) {
    SplitA a[kRowTiles];
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) {
      MGHF_UNROLL_ALL
      for (int part = 0; part < 4; ++part) {
        const int row = place.row + 16 * i + part % 2 * 8;
        const int pixel = step * 8 + place.t + part / 2 * 4;
        const float x = to_float(pixels[At::at(row, pixel)]);
        if constexpr (exact_in_tf32<T>) {
          a[i].big[part] = bits_as<uint32_t>(x);
        } else {
          put<kOnce>(a[i], part, x);
        }
      }
    }
    MGHF_UNROLL_ALL
    for (int run = 0; run < kColumnTiles; run += kRun) {
      if (run * 8 >= columns) break;
      add_four_tiles<exact_in_tf32<T>, kOnce>(sums, run, a,
                                              packed + (step * kTilesOfGroup + run) * kWarp);
    }
  }
}

// An element of a matrix, 0 outside it.
__device__ __forceinline__ float at_or_zero(const float* matrix, int64_t row, int64_t rows,
                                            int64_t column, int64_t columns) {
  return row < rows && column < columns ? matrix[row * columns + column] : 0.0f;
}

// Shared memory of a block of the forward besides its slices: its rows' first pixels in the image
// (-1: no row), their places in state and embedding, |y|^2 from both columns of warps.
struct RowsOfBlock {
  int64_t first_pixels[kRows], state_places[kRows], embedding_places[kRows];
  float squares[2][kRows];
};

template <class T, bool kMaps>
__device__ __forceinline__ void find_rows(RowsOfBlock& rows, const Image<T>& x, const Patches& p,
                                          int64_t first_row) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kRows) return;
  const bool exists = first_row + thread < p.number();
  const Row row(first_row + thread, p.maps, p.of_map(), kMaps);
  rows.first_pixels[thread] =
      exists ? first_pixel(x, p.channels, row.map, row.item, p.columns, p.stride) : -1;
  rows.state_places[thread] = row.item * p.state_words() * p.maps + row.map;
  rows.embedding_places[thread] = (row.map * p.of_map() + row.item) * p.dimension;
}

// How often loops that copy are unrolled; with more, registers spill.
template <int kWidth>
constexpr int kUnrolled = kWidth == 1 ? 1 : 2;

// kWidth: the number of elements copied at once.
template <class T, bool kMaps, int kWidth>
__device__ __forceinline__ void copy_pixels(T* slice, int number, const Image<T>& x,
                                            const Patches& p, const RowsOfBlock& rows) {
  constexpr int kLine = (kMaps ? kRows : kPixels) / kWidth;
  // Opaque, to be recomputed: keeping it in registers during the products would cost more.
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int first_line = number * kPixels / p.size, first_column = number * kPixels % p.size;
  MGHF_UNROLL(kUnrolled<kWidth>)
  for (int c = thread; c < kRows * kPixels / kWidth; c += kThreads) {
    // A thread has the same `along` each time.
    const int along = thread % kLine * kWidth, across = c / kLine;
    const int row = kMaps ? along : across, local = kMaps ? across : along;
    int line = first_line, column = first_column + local;
    while (column >= p.size) {
      column -= p.size;
      ++line;
    }
    const int64_t first = rows.first_pixels[row];
    const bool exists = line < p.size && first >= 0;
    const T* const from =
        exists ? x.data + first + line * x.row_stride + column * x.column_stride : x.data;
    T* const to = slice + Slice<T, kMaps>::at(row, local);
    if constexpr (kWidth * sizeof(T) >= 4) {
      constexpr int kBytes = kWidth * static_cast<int>(sizeof(T));
      copy_async<kBytes>(to, from, exists ? kBytes : 0);
    } else {
      *to = exists ? *from : T{};
    }
  }
}

__device__ __forceinline__ void copy_weights(uint4* slice, int number, const Factor& weight1,
                                             int first_unit) {
  const int step = first_unit / kColumns * weight1.steps + number * kStepsOfSlice;
  const uint4* const from = weight1.to + int64_t{step} * (kTilesOfGroup * kWarp);
  MGHF_UNROLL(2)
  for (int c = opaque(static_cast<int>(threadIdx.x)); c < kWeightsOfSlice; c += kThreads) {
    copy_async<16>(slice + c, from + c);
  }
}

__device__ __forceinline__ void start_with_bias(Sums& sums, const float* bias1, int first_unit,
                                                const ThreadPlace& place, const Patches& p) {
  MGHF_UNROLL_ALL
  for (int n = 0; n < 2 * kColumnTiles; ++n) {
    const int j = n / 2, unit = first_unit + place.column + 8 * j + n % 2;
    const float bias = unit < p.hidden ? bias1[unit] : 0.0f;
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) sums[i][j][n % 2] = sums[i][j][2 + n % 2] = bias;
  }
}

// Computes h from a warp's sums of the first layer, into shared memory.
__device__ __forceinline__ void finish_hidden(const Sums& sums, float* hidden, int first_unit,
                                              const ThreadPlace& place, const Patches& p) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < kRowTiles; ++i) {
    MGHF_UNROLL_ALL
    for (int part = 0; part < 4; ++part) {
      float* const row = hidden + (place.row + 16 * i + part / 2 * 8) * kHiddenPitch;
      MGHF_UNROLL_ALL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int local = place.column + 8 * j + part % 2;
        const float before = sums[i][j][part];
        // A NaN must stay one, except in columns without a unit.
        row[local] = first_unit + local >= p.hidden || before < 0 ? 0.0f : before;
      }
    }
  }
}

// Writes the bits h > 0 to the state.
__device__ __forceinline__ void write_bits(const float* hidden, int* state, int first_unit,
                                           int64_t first_row, const Patches& p,
                                           const RowsOfBlock& rows) {
  for (int c = static_cast<int>(threadIdx.x); c < kRows * kColumns / 32; c += kThreads) {
    const int row = c % kRows, word = c / kRows, place = 1 + first_unit / 32 + word;
    if (first_row + row >= p.number() || place >= p.state_words()) continue;
    unsigned bits = 0;
    MGHF_UNROLL(8)
    for (int i = 0; i < 32; ++i) {
      const int unit = (i + row) % 32;  // no bank conflicts within a load
      if (hidden[row * kHiddenPitch + word * 32 + unit] > 0) bits |= 1u << unit;
    }
    state[rows.state_places[row] + place * p.maps] = static_cast<int>(bits);
  }
}

// Adds the share of `units` hidden units from first_unit on to y, which starts with bias2.
__device__ __forceinline__ void add_second_layer(float* embedding, const float* hidden,
                                                 const Factor& weight2, const float* bias2,
                                                 int first_unit, int units, int64_t first_row,
                                                 const ThreadPlace& place, const Patches& p,
                                                 const RowsOfBlock& rows) {
  MGHF_UNROLL(1)
  for (int first_d = place.warp_column / 2; first_d < p.dimension; first_d += 64) {
    float y[kRowTiles][4][4] = {};
    const auto multiply = [&](auto one_product) {
      constexpr bool kOnce = decltype(one_product)::value;
      MGHF_UNROLL(1)
      for (int first = 0; first < units; first += 8) {
        SplitA a[kRowTiles];
        MGHF_UNROLL_ALL
        for (int i = 0; i < kRowTiles; ++i) {
          MGHF_UNROLL_ALL
          for (int part = 0; part < 4; ++part) {
            const int row = place.row + 16 * i + part % 2 * 8;
            put<kOnce>(a[i], part, hidden[row * kHiddenPitch + first + place.t + part / 2 * 4]);
          }
        }
        add_four_tiles<false, kOnce>(y, 0, a, weight2.at(first_d, first_unit + first));
      }
    };
    if (p.once) {
      multiply(std::true_type{});
    } else {
      multiply(std::false_type{});
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) {
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + 16 * i + 8 * half;
        float* const target = embedding + rows.embedding_places[row];
        MGHF_UNROLL_ALL
        for (int n = 0; n < 8; ++n) {
          const int d = first_d + n / 2 * 8 + 2 * place.t + n % 2;
          if (first_row + row < p.number() && d < p.dimension) {
            target[d] =
                y[i][n / 2][2 * half + n % 2] + (first_unit == 0 ? bias2[d] : target[d]);
          }
        }
      }
    }
  }
}

// Divides y in the embedding by its length, which goes to the state. Every thread divides the
// numbers that it wrote, so no barrier is needed.
__device__ __forceinline__ void normalise(float* embedding, int* state, int64_t first_row,
                                          const ThreadPlace& place, const Patches& p,
                                          RowsOfBlock& rows) {
  const auto for_each_own = [&](int row, const auto& visit) {
    if (first_row + row >= p.number()) return;
    float* const target = embedding + rows.embedding_places[row];
    for (int first_d = place.warp_column / 2; first_d < p.dimension; first_d += 64) {
      MGHF_UNROLL_ALL
      for (int n = 0; n < 8; ++n) {
        const int d = first_d + n / 2 * 8 + 2 * place.t + n % 2;
        if (d < p.dimension) visit(target[d]);
      }
    }
  };
  MGHF_UNROLL(1)
  for (int row = place.row; row < place.row + 32; row += 8) {
    float sum = 0;
    for_each_own(row, [&](float y) { sum += y * y; });
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (place.t == 0) rows.squares[place.warp / 4][row] = sum;
  }
  __syncthreads();
  MGHF_UNROLL(1)
  for (int row = place.row; row < place.row + 32; row += 8) {
    const float norm = sqrtf(rows.squares[0][row] + rows.squares[1][row]);
    for_each_own(row, [&](float& y) { y = y / (norm + kNormFloor); });
    if (place.t == 0 && place.warp < 4 && first_row + row < p.number()) {
      state[rows.state_places[row]] = bits_as<int>(norm);
    }
  }
}

// With `hidden_layer` the hidden layer is kept there, (rows, hidden); without an embedding and a
// state there is no second layer.
template <class T, bool kMaps, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    project(Image<T> x, Patches p, Factor weight1, const float* bias1, Factor weight2,
            const float* bias2, float* embedding, int* state, float* hidden_layer) {
  constexpr int kBytes = Slice<T, kMaps>::kBytes;
  __shared__ RowsOfBlock rows;
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  float* const hidden = reinterpret_cast<float*>(memory);
  const ThreadPlace place;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int slices = static_cast<int>(up(p.pixels(), kPixels));
  find_rows<T, kMaps>(rows, x, p, first_row);

  for (int first_unit = 0; first_unit == 0 || first_unit < p.hidden; first_unit += kColumns) {
    const auto copy_slice = [&](int number) {
      unsigned char* const slice = memory + number % 2 * (kBytes + kWeightBytes);
      copy_pixels<T, kMaps, kWidth>(reinterpret_cast<T*>(slice), number, x, p, rows);
      copy_weights(reinterpret_cast<uint4*>(slice + kBytes), number, weight1, first_unit);
      end_copies();
    };
    __syncthreads();  // the rows' places are known, the last units' hidden layer has been used
    Sums sums;
    start_with_bias(sums, bias1, first_unit, place, p);
    copy_slice(0);
    MGHF_UNROLL(1)
    for (int number = 0; number < slices; ++number) {
      wait_for_copies<0>();
      __syncthreads();  // the slice is complete, the previous one has been used
      if (number + 1 < slices) copy_slice(number + 1);
      const unsigned char* const slice = memory + number % 2 * (kBytes + kWeightBytes);
      const T* const pixels = reinterpret_cast<const T*>(slice);
      const uint4* const weights = reinterpret_cast<const uint4*>(slice + kBytes);
      const int columns = p.hidden - first_unit - place.warp_column;
      if (p.once) {
        multiply_slice<T, kMaps, true>(sums, pixels, weights, place, columns);
      } else {
        multiply_slice<T, kMaps, false>(sums, pixels, weights, place, columns);
      }
    }
    __syncthreads();  // the last slice has been used
    finish_hidden(sums, hidden, first_unit, place, p);
    __syncthreads();  // the hidden layer is complete

    const int units = static_cast<int>(smaller(p.hidden - first_unit, kColumns));
    if (embedding != nullptr) {
      write_bits(hidden, state, first_unit, first_row, p, rows);
      add_second_layer(embedding, hidden, weight2, bias2, first_unit, units, first_row, place, p,
                       rows);
    }
    if (hidden_layer == nullptr) continue;
    const int64_t number = smaller(p.number() - first_row, kRows);
    for (int c = static_cast<int>(threadIdx.x); c < number * kColumns; c += kThreads) {
      const int row = c / kColumns, unit = c % kColumns;
      if (unit < units) {
        hidden_layer[(first_row + row) * p.hidden + first_unit + unit] =
            hidden[row * kHiddenPitch + unit];
      }
    }
  }
  if (embedding != nullptr) normalise(embedding, state, first_row, place, p, rows);
}

}  // namespace

}  // namespace mghf::cuda
