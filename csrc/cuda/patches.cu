// The strided patch projection and its gradients.
//
//     h = relu(W1 patch + b1)      y = W2 h + b2      embedding e = y / (|y| + 1e-7)
//     d_y = (d_e - e <d_e, e> (1 + 1e-7 / |y|)) / (|y| + 1e-7)      d_h = (W2^T d_y) [h > 0]
//     d_x: every pixel sums W1^T d_h over the patches that cover it
//     d_W1 = sum d_h patch^T      d_b1 = sum d_h      d_W2 = sum d_y h^T      d_b2 = sum d_y
//
// All of them are products of matrices by tensor cores whose rows are the pairs of a patch (or of a
// cell of the image, see there) and a map. Maps run fastest among the rows if they do in the image,
// otherwise patches do, so that what is copied at once lies side by side. No patch is ever copied
// in global memory. |y| and the bits h > 0 come from the forward's state.
//
// Sizes in the predictions: B = 1, C = 128 maps of 512 x 512, N = 441 patches of K = 1024 pixels,
// 128 hidden units, D = 64: R = 56,448 rows; on an H200 with 4.3 TB/s, 300 TFLOP/s of TF32 and 600
// of bfloat16 by mma.sync.
#include "patches.h"

#include <math.h>

#include "mma.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = 256;
constexpr float kNormFloor = 1e-7f;
constexpr float kTiny = 1.1754943508222875e-38f;  // the least normal number

// A block's result is 128 rows x 128 columns: that of a warp 32 x 64, in 2 x 8 tiles of 16 x 8.
constexpr int kRows = 128;
constexpr int kColumns = 128;
constexpr int kRowTiles = 2;
constexpr int kColumnTiles = 8;
// Tiles of columns that a warp skips together if none of their columns exists.
constexpr int kRun = 4;
static_assert(kRun == 4, "as add_four_tiles takes them");

__host__ __device__ constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The patches of all maps, and what of a projection's shape the kernels need.
struct Patches {
  int64_t maps, channels;
  int rows, columns;  // of patches in a map
  int size, stride, hidden, dimension;
  bool maps_fastest;

  template <class AnyImage>
  Patches(const AnyImage& x, const Projection& p)
      : maps(x.batch * x.channels),
        channels(x.channels),
        rows(static_cast<int>((x.height - p.patch_size) / p.stride + 1)),
        columns(static_cast<int>((x.width - p.patch_size) / p.stride + 1)),
        size(static_cast<int>(p.patch_size)),
        // One beyond the image has no further patch either.
        stride(static_cast<int>(
            smaller(p.stride, x.height > x.width ? x.height : x.width))),
        hidden(static_cast<int>(p.hidden)),
        dimension(static_cast<int>(p.dimension)),
        maps_fastest(x.channel_stride < x.column_stride) {}

  __host__ __device__ int64_t of_map() const { return static_cast<int64_t>(rows) * columns; }
  __host__ __device__ int64_t number() const { return maps * of_map(); }
  __host__ __device__ int pixels() const { return size * size; }
  __host__ __device__ int state_words() const { return 1 + (hidden + 31) / 32; }
};

// A row of the matrices: the pair of an item of `items` and a map.
struct Row {
  int64_t item, map;

  __device__ __forceinline__ Row(int64_t row, int64_t maps, int64_t items, bool maps_fastest)
      : item(maps_fastest ? row / maps : row % items),
        map(maps_fastest ? row % maps : row / items) {}
};

// Where a thread stands in the block's result: rows + 8 i, columns + 8 j and the one after it.
struct Place {
  int warp, g, t;
  int row, column;  // its first ones
  int warp_column;

  __device__ __forceinline__ Place()
      : warp(static_cast<int>(threadIdx.x) / kWarp),
        g(static_cast<int>(threadIdx.x) % kWarp / 4),
        t(static_cast<int>(threadIdx.x) % 4),
        row(warp % 4 * 32 + g),
        column(warp / 4 * 64 + 2 * t),
        warp_column(warp / 4 * 64) {}
};

// The image's place of a patch's or a cell's first pixel.
template <class AnyImage>
__device__ __forceinline__ int64_t first_pixel(const AnyImage& x, int64_t channels, int64_t map,
                                               int64_t item, int columns, int stride) {
  return map / channels * x.batch_stride + map % channels * x.channel_stride +
         item / columns * stride * x.row_stride + item % columns * stride * x.column_stride;
}

// ---- weights as factors ----

// A matrix of columns by depths, as two TF32 each, in the order in which tensor cores take them:
// [128 columns][8 depths][8 columns][lane]. Split once a call, and not by every block again.
constexpr int kTilesOfGroup = kColumns / 8;
constexpr int kStepsOfSlice = 2;  // of 8 depths; whole slices, with zeros

struct Factor {
  const float* from;
  int64_t columns, depths, column_stride, depth_stride;
  uint4* to;
  int steps;  // of 8 depths

  Factor() = default;
  Factor(const float* from, int64_t columns, int64_t depths, int64_t column_stride,
         int64_t depth_stride)
      : from(from),
        columns(columns),
        depths(depths),
        column_stride(column_stride),
        depth_stride(depth_stride),
        to(nullptr),
        steps(static_cast<int>(up(depths, 8 * kStepsOfSlice) * kStepsOfSlice)) {}

  __host__ __device__ int64_t size() const {
    return up(columns, kColumns) * steps * kTilesOfGroup * kWarp;
  }
  // From 8 depths of a lane's column on, a tile of columns after the other kWarp apart.
  __device__ __forceinline__ const uint4* at(int column, int depth) const {
    const int step = column / kColumns * steps + depth / 8;
    return to + (int64_t{step} * kTilesOfGroup + column % kColumns / 8) * kWarp +
           threadIdx.x % kWarp;
  }
  __device__ void pack(int64_t i) const {
    const int64_t lane = i % kWarp, tile = i / kWarp % kTilesOfGroup;
    const int64_t step = i / (kWarp * kTilesOfGroup) % steps;
    const int64_t column = i / (kWarp * kTilesOfGroup) / steps * kColumns + tile * 8 + lane / 4;
    const auto number = [&](int64_t depth) {
      return column < columns && depth < depths
                 ? from[column * column_stride + depth * depth_stride]
                 : 0.0f;
    };
    const SplitTf32 first(number(step * 8 + lane % 4)), second(number(step * 8 + lane % 4 + 4));
    to[i] = {first.big, second.big, first.small, second.small};
  }
};

__global__ void __launch_bounds__(kThreads) pack(Factor one, Factor other) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < one.size()) {
    one.pack(i);
  } else if (i - one.size() < other.size()) {
    other.pack(i - one.size());
  }
}

__device__ __forceinline__ SplitB factor_of(const uint4& packed) {
  return {{packed.x, packed.y}, {packed.z, packed.w}};
}

// Four of a factor's tiles, one after the other: there are no registers for more.
template <bool kExactA, int kAll>
__device__ __forceinline__ void add_four_tiles(float (&sums)[kRowTiles][kAll][4], int first,
                                               const SplitA (&a)[kRowTiles], const uint4* packed) {
  MGHF_UNROLL_ALL
  for (int j = 0; j < 4; ++j) {
    const SplitB b[1] = {factor_of(packed[j * kWarp])};
    add_products<TripleTf32, kExactA>(sums, first + j, a, b);
  }
}

__device__ __forceinline__ void put(SplitA& a, int part, float x) {
  const SplitTf32 split(x);
  a.big[part] = split.big;
  a.small[part] = split.small;
}

// ---- forward ----

// A block takes 128 rows through both layers. The first is a product in slices of 16 pixels of the
// patches: two slices of the patches and of W1 in shared memory, the next one on its way while
// tensor cores multiply by the other. Three products of TF32 each, two for images of half
// precision, whose pixels are exact in one. Sums of products of 8 pixels are added up outside of the
// tensor cores. The hidden layer, 128 units at a time, stays in shared
// memory for the second layer; y is summed up in the embedding's own place, each number by one
// thread, and divided at the end.
//
// Reads x (134 MB, 31 us) and of W1 462 MB from the second-level cache, writes 15.6 MB (4 us).
// R 128 (1024 + 64) = 7.86 G multiply-adds by three products: 47 GFLOP, 157 us. An SM has two
// blocks at a time; of 441 the busiest of 132 SMs get four, on average they get 3.3: about 190 us.

constexpr int kPixels = 8 * kStepsOfSlice;  // of a slice
constexpr int kHiddenPitch = kColumns + 4;

// Of an image in shared memory: [row][pixel], or [pixel][row] where maps run fastest.
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

// Adds a slice's product to a warp's sums; `columns`: of the warp's 64, those that exist.
template <class T, bool kMaps>
__device__ __forceinline__ void multiply_slice(Sums& sums, const T* pixels, const uint4* weights,
                                               const Place& place, int columns) {
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
          put(a[i], part, x);
        }
      }
    }
    MGHF_UNROLL_ALL
    for (int run = 0; run < kColumnTiles; run += kRun) {
      if (run * 8 >= columns) break;
      add_four_tiles<exact_in_tf32<T>>(sums, run, a,
                                       packed + (step * kTilesOfGroup + run) * kWarp);
    }
  }
}

// A number of a matrix that is not there is 0.
__device__ __forceinline__ float at_or_zero(const float* matrix, int64_t row, int64_t rows,
                                            int64_t column, int64_t columns) {
  return row < rows && column < columns ? matrix[row * columns + column] : 0.0f;
}

// What a block of the forward has in shared memory beside its slices: its rows' first pixels in the
// image (-1: no row), their places in state and embedding, |y|^2 by the two columns of warps.
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

// How often loops that copy are unrolled; if more often, registers spill.
template <int kWidth>
constexpr int kUnrolled = kWidth == 1 ? 1 : 2;

// kWidth: how many numbers are copied at once.
template <class T, bool kMaps, int kWidth>
__device__ __forceinline__ void copy_pixels(T* slice, int number, const Image<T>& x,
                                            const Patches& p, const RowsOfBlock& rows) {
  constexpr int kLine = (kMaps ? kRows : kPixels) / kWidth;
  // Anew: what would be kept of it while products are computed costs more than it takes.
  const int thread = anew(static_cast<int>(threadIdx.x));
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
  for (int c = anew(static_cast<int>(threadIdx.x)); c < kWeightsOfSlice; c += kThreads) {
    copy_async<16>(slice + c, from + c);
  }
}

__device__ __forceinline__ void start_with_bias(Sums& sums, const float* bias1, int first_unit,
                                                const Place& place, const Patches& p) {
  MGHF_UNROLL_ALL
  for (int n = 0; n < 2 * kColumnTiles; ++n) {
    const int j = n / 2, unit = first_unit + place.column + 8 * j + n % 2;
    const float bias = unit < p.hidden ? bias1[unit] : 0.0f;
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) sums[i][j][n % 2] = sums[i][j][2 + n % 2] = bias;
  }
}

// h from a warp's sums of the first layer, into shared memory.
__device__ __forceinline__ void finish_hidden(const Sums& sums, float* hidden, int first_unit,
                                              const Place& place, const Patches& p) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < kRowTiles; ++i) {
    MGHF_UNROLL_ALL
    for (int part = 0; part < 4; ++part) {
      float* const row = hidden + (place.row + 16 * i + part / 2 * 8) * kHiddenPitch;
      MGHF_UNROLL_ALL
      for (int j = 0; j < kColumnTiles; ++j) {
        const int local = place.column + 8 * j + part % 2;
        const float before = sums[i][j][part];
        // A NaN stays one, except in columns that are no unit.
        row[local] = first_unit + local >= p.hidden || before < 0 ? 0.0f : before;
      }
    }
  }
}

// The bits h > 0 into the state.
__device__ __forceinline__ void write_bits(const float* hidden, int* state, int first_unit,
                                           int64_t first_row, const Patches& p,
                                           const RowsOfBlock& rows) {
  for (int c = static_cast<int>(threadIdx.x); c < kRows * kColumns / 32; c += kThreads) {
    const int row = c % kRows, word = c / kRows, place = 1 + first_unit / 32 + word;
    if (first_row + row >= p.number() || place >= p.state_words()) continue;
    unsigned bits = 0;
    MGHF_UNROLL(8)
    for (int i = 0; i < 32; ++i) {
      const int unit = (i + row) % 32;  // no two threads of a load meet in a bank
      if (hidden[row * kHiddenPitch + word * 32 + unit] > 0) bits |= 1u << unit;
    }
    state[rows.state_places[row] + place * p.maps] = static_cast<int>(bits);
  }
}

// Adds the share of `units` hidden units from first_unit on to y, which starts with bias2.
__device__ __forceinline__ void add_second_layer(float* embedding, const float* hidden,
                                                 const Factor& weight2, const float* bias2,
                                                 int first_unit, int units, int64_t first_row,
                                                 const Place& place, const Patches& p,
                                                 const RowsOfBlock& rows) {
  MGHF_UNROLL(1)
  for (int first_d = place.warp_column / 2; first_d < p.dimension; first_d += 64) {
    float y[kRowTiles][4][4] = {};
    MGHF_UNROLL(1)
    for (int first = 0; first < units; first += 8) {
      SplitA a[kRowTiles];
      MGHF_UNROLL_ALL
      for (int i = 0; i < kRowTiles; ++i) {
        MGHF_UNROLL_ALL
        for (int part = 0; part < 4; ++part) {
          const int row = place.row + 16 * i + part % 2 * 8;
          put(a[i], part, hidden[row * kHiddenPitch + first + place.t + part / 2 * 4]);
        }
      }
      add_four_tiles<false>(y, 0, a, weight2.at(first_d, first_unit + first));
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

// Divides y in the embedding by its length, which goes to the state. Every thread has the numbers
// that it wrote, so there is no barrier for them.
__device__ __forceinline__ void normalise(float* embedding, int* state, int64_t first_row,
                                          const Place& place, const Patches& p,
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
  const Place place;
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
    __syncthreads();  // the rows' places are known, the last units' hidden layer is used up
    Sums sums;
    start_with_bias(sums, bias1, first_unit, place, p);
    copy_slice(0);
    MGHF_UNROLL(1)
    for (int number = 0; number < slices; ++number) {
      wait_for_copies<0>();
      __syncthreads();  // the slice is there, and the one before it used up
      if (number + 1 < slices) copy_slice(number + 1);
      const unsigned char* const slice = memory + number % 2 * (kBytes + kWeightBytes);
      multiply_slice<T, kMaps>(sums, reinterpret_cast<const T*>(slice),
                               reinterpret_cast<const uint4*>(slice + kBytes), place,
                               p.hidden - first_unit - place.warp_column);
    }
    __syncthreads();  // the last slice is used up
    finish_hidden(sums, hidden, first_unit, place, p);
    __syncthreads();  // the hidden layer is there

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

// ---- gradient before the ReLU ----

// Gradients are three products of bfloat16 (`SplitPair`), which cost half of what three of TF32 do and
// leave an error of 5e-6.

constexpr int kDepth = 32;            // of a slice
constexpr int kPitch = kDepth + 4;    // of float32: no two threads of a load meet in a bank
constexpr int kEights = kDepth / 8;   // of a slice, each of them of two pieces
constexpr int kPiecesOfSlice = 2 * kEights;

// Eight neighbouring units of a row or column, as four pairs of big parts and, in the next piece,
// of small ones: a row of the matrices that tensor cores are loaded with.
__host__ __device__ constexpr int pieces_of(int hidden) {
  return (hidden + kDepth - 1) / kDepth * kPiecesOfSlice;
}

// A block's result is 128 rows x 128 units at a time; the slices of d_y are computed as they are
// put into shared memory. Writes d_h as pieces (rows, pieces_of(hidden)), or else as numbers
// (rows, hidden) together with d_y (rows, dimension).
//
// Reads d_e, e and the state, 30 MB, and writes 29 MB: 14 us. R 64 128 = 0.46 G multiply-adds by
// three products of TF32: 9 us.
template <bool kPieces>
__global__ void __launch_bounds__(kThreads, kPieces && kClusters ? 2 : 1)  // or it spills
    hidden_gradient(Patches p, EmbeddingGradient gradient, Factor weight2, uint32_t* pieces,
                    float* grad_hidden, float* grad_output) {
  __shared__ int64_t state_places[kRows], embedding_places[kRows], grad_places[kRows];
  __shared__ float along[kRows], norms[kRows];
  __shared__ float slice[kRows * kPitch];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const Place place;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int rows = static_cast<int>(smaller(p.number() - first_row, kRows));

  if (thread < rows) {
    const Row row(first_row + thread, p.maps, p.of_map(), p.maps_fastest);
    state_places[thread] = row.item * p.state_words() * p.maps + row.map;
    embedding_places[thread] = (row.map * p.of_map() + row.item) * p.dimension;
    grad_places[thread] = row.map * gradient.map_stride + row.item * gradient.patch_stride;
    norms[thread] = bits_as<float>(gradient.state[state_places[thread]]);
  }
  __syncthreads();
  const auto grad_at = [&](int row, int d) {
    return gradient.grad[grad_places[row] + d * gradient.dimension_stride];
  };
  const auto embedding_at = [&](int row, int d) {
    return gradient.embedding[embedding_places[row] + d];
  };
  for (int row = place.warp; row < rows; row += kThreads / kWarp) {
    float sum = 0;
    for (int d = lane; d < p.dimension; d += kWarp) sum += grad_at(row, d) * embedding_at(row, d);
    MGHF_UNROLL_ALL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAllLanes, sum, mask);
    // At y = 0 the embedding is 0 as well; the least normal number only keeps 0/0 away.
    const float least = norms[row] < kTiny ? kTiny : norms[row];
    if (lane == 0) along[row] = sum * ((least + kNormFloor) / least);
  }
  __syncthreads();

  for (int first_unit = 0; first_unit < p.hidden; first_unit += kColumns) {
    const int columns = p.hidden - first_unit - place.warp_column;
    Sums sums = {};
    MGHF_UNROLL(1)
    for (int first_d = 0; first_d < p.dimension; first_d += kDepth) {
      MGHF_UNROLL(2)
      for (int c = anew(thread); c < kRows * kDepth; c += kThreads) {
        const int row = c / kDepth, d = first_d + c % kDepth;
        float value = 0;
        if (row < rows && d < p.dimension) {
          value = (grad_at(row, d) - embedding_at(row, d) * along[row]) / (norms[row] + kNormFloor);
          if (!kPieces && first_unit == 0) {
            grad_output[(first_row + row) * p.dimension + d] = value;
          }
        }
        slice[row * kPitch + c % kDepth] = value;
      }
      __syncthreads();
      MGHF_UNROLL(1)
      for (int first = 0; first < kDepth && first_d + first < p.dimension; first += 8) {
        SplitA a[kRowTiles];
        MGHF_UNROLL_ALL
        for (int i = 0; i < kRowTiles; ++i) {
          MGHF_UNROLL_ALL
          for (int part = 0; part < 4; ++part) {
            const int row = place.row + 16 * i + part % 2 * 8;
            put(a[i], part, slice[row * kPitch + first + place.t + part / 2 * 4]);
          }
        }
        MGHF_UNROLL_ALL
        for (int run = 0; run < kColumnTiles; run += kRun) {
          if (run * 8 >= columns) break;
          add_four_tiles<false>(sums, run, a,
                                weight2.at(first_unit + place.warp_column + 8 * run,
                                           first_d + first));
        }
      }
      __syncthreads();  // the slice is used up
    }

    // Found anew: kept over the products it would spill.
    const int64_t own_row = static_cast<int64_t>(anew(static_cast<int>(blockIdx.x))) * kRows;
    const int state_word = 1 + (first_unit + place.warp_column) / 32;
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) {
      MGHF_UNROLL_ALL
      for (int half = 0; half < 2; ++half) {
        const int row = place.row + 16 * i + 8 * half;
        if (row >= rows) continue;
        unsigned words[2] = {0, 0};
        MGHF_UNROLL_ALL
        for (int word = 0; word < 2; ++word) {
          if (state_word + word < p.state_words()) {
            words[word] = static_cast<unsigned>(
                gradient.state[state_places[row] + (state_word + word) * p.maps]);
          }
        }
        MGHF_UNROLL_ALL
        for (int j = 0; j < kColumnTiles; ++j) {
          const int unit = first_unit + place.column + 8 * j;
          float value[2];
          MGHF_UNROLL_ALL
          for (int c = 0; c < 2; ++c) {
            const float positive = words[j / 4] >> (unit + c) % 32 & 1 ? 1.0f : 0.0f;
            // A product, so that a NaN stays one.
            value[c] = unit + c < p.hidden ? sums[i][j][2 * half + c] * positive : 0.0f;
            if (!kPieces && unit + c < p.hidden) {
              grad_hidden[(own_row + row) * p.hidden + unit + c] = value[c];
            }
          }
          const int piece = unit / 8 * 2;
          if (!kPieces || piece >= pieces_of(p.hidden)) continue;
          const SplitPair pair(value[0], value[1]);
          uint32_t* const to =
              pieces + ((own_row + row) * pieces_of(p.hidden) + piece) * 4 + place.t;
          to[0] = pair.big;
          to[4] = pair.small;
        }
      }
    }
  }
}

// ---- gradient of the image ----

// W1 as [8 units][pixel][piece], and the factor of d_y.
__global__ void __launch_bounds__(kThreads)
    pack_for_gradient(Patches p, const float* weight1, uint32_t* pieces, Factor weight2) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = p.pixels(), count = pieces_of(p.hidden) * pixels * 2;
  if (i < count) {
    const int64_t unit = i / 4 / pixels * 8 + i % 4 * 2, pixel = i / 4 % pixels;
    const SplitPair pair(at_or_zero(weight1, unit, p.hidden, pixel, pixels),
                         at_or_zero(weight1, unit + 1, p.hidden, pixel, pixels));
    uint32_t* const to = pieces + i / 4 * 8 + i % 4;
    to[0] = pair.big;
    to[4] = pair.small;
  } else if (i - count < weight2.size()) {
    weight2.pack(i - count);
  }
}

// The image falls into cells of stride x stride pixels. Pixel (r, p) of cell (i, j) is pixel
// (r + s stride, p + t stride) of patch (i - s, j - t), for all s, t that stay within the patch:
//   d_x = sum_st sum_h W1[h][r + s stride][p + t stride] d_h[i - s, j - t][h]
//
// A product for each s, t: rows are pairs of a cell and a map, columns are 128 pixels of the cell.
// Of a cell's first rows of pixels `terms` patches lie one above the other, of the others one less,
// and so with its first columns. A block's pixels are from one of these four regions, so that no
// product is with zeros (with which a NaN of another patch would get in). Every pixel is written
// once, or added to once. Slices of 32 hidden units, of d_h and of W1, double-buffered.
//
// Writes the gradient (134 MB, 31 us; adding also reads it, 62 us). R 128 1024 = 7.4 G
// multiply-adds by three products of bfloat16: 74 us. The five tiles of 128 rows take 640 KB of d_h
// and 512 KB of W1 from the second-level cache, all rows 0.56 GB: about 100 us at 5.5 TB/s, which
// bounds it.
struct Regions {
  int terms;                  // patches that cover a cell's first pixels, per direction
  int height, width;          // of a cell
  int top, left;              // rows and columns with `terms` patches
  int first[4], tiles;        // the regions' first tiles: top left, top right, bottom left, right
  int cell_rows, cell_columns;

  Regions(const Patches& p, int64_t image_height, int64_t image_width)
      : terms(static_cast<int>(up(p.size, p.stride))),
        height(static_cast<int>(smaller(p.stride, image_height))),
        width(static_cast<int>(smaller(p.stride, image_width))),
        top(static_cast<int>(smaller(p.size - (terms - 1) * p.stride, height))),
        left(static_cast<int>(smaller(p.size - (terms - 1) * p.stride, width))),
        cell_rows(static_cast<int>(up(image_height, p.stride))),
        cell_columns(static_cast<int>(up(image_width, p.stride))) {
    const int sizes[4] = {top * left, top * (width - left), (height - top) * left,
                          (height - top) * (width - left)};
    tiles = 0;
    for (int i = 0; i < 4; ++i) {
      first[i] = tiles;
      tiles += static_cast<int>(up(sizes[i], kColumns));
    }
  }
  __host__ __device__ int64_t cells() const {
    return static_cast<int64_t>(cell_rows) * cell_columns;
  }
  // Whether pixels of a cell may be taken by twos.
  bool even(const Patches& p) const {
    return (p.size | p.stride | width | left) % 2 == 0;
  }
};

// A block's tile: `pixels` pixels from number `begin` on of a region.
struct Tile {
  int row, column, columns;  // of the region
  int begin, pixels;
  int row_terms, column_terms;

  __device__ __forceinline__ Tile(const Regions& regions, int tile) {
    const bool below = tile >= regions.first[2];
    const bool right = tile >= regions.first[3] || (tile >= regions.first[1] && !below);
    const int first = right ? (below ? regions.first[3] : regions.first[1])
                            : (below ? regions.first[2] : 0);
    row = below ? regions.top : 0;
    column = right ? regions.left : 0;
    columns = right ? regions.width - regions.left : regions.left;
    row_terms = regions.terms - (below ? 1 : 0);
    column_terms = regions.terms - (right ? 1 : 0);
    begin = (tile - first) * kColumns;
    const int rest = (below ? regions.height - regions.top : regions.top) * columns - begin;
    pixels = rest < kColumns ? rest : kColumns;
  }
};

struct CellRow {
  int64_t patch;  // its row of d_h for s = t = 0, where there may be none; -1: no row
  int64_t place;  // in the image
  int i, j;
};

// Neighbouring pixels of a row.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

// Where a piece of a row or a column lies: [row][piece], and of eight rows each has its own order, so
// that the same piece of all of them lies in all of the banks.
__device__ __forceinline__ int piece_at(int row, int piece) {
  return row * kPiecesOfSlice + (piece ^ (row & 7));
}
static_assert(kPiecesOfSlice == 8);
constexpr int kLeftSize = kRows * kPiecesOfSlice;
constexpr int kSliceSize = kLeftSize + kColumns * kPiecesOfSlice;

__device__ __forceinline__ void multiply_pieces(Sums& sums, const uint4* left, const uint4* right,
                                                const Place& place, int columns) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, matrix = lane / 8;
  const int first_row = place.warp % 4 * 32 + matrix % 2 * 8 + lane % 8;
  const int first_column = place.warp_column + lane % 8;
  MGHF_UNROLL(1)
  for (int first = 0; first < kEights; first += 2) {
    SplitA a[kRowTiles];
    MGHF_UNROLL_ALL
    for (int i = 0; i < kRowTiles; ++i) {
      const int row = first_row + 16 * i, piece = (first + matrix / 2) * 2;
      load_matrices(a[i].big, left + piece_at(row, piece));
      load_matrices(a[i].small, left + piece_at(row, piece + 1));
    }
    MGHF_UNROLL_ALL
    for (int run = 0; run < kColumnTiles; run += kRun) {
      if (run * 8 >= columns) break;
      MGHF_UNROLL_ALL
      for (int j = run; j < run + kRun; ++j) {
        uint32_t loaded[4];
        load_matrices(loaded, right + piece_at(first_column + 8 * j,
                                               (first + matrix % 2) * 2 + matrix / 2));
        const SplitB b[1] = {{{loaded[0], loaded[1]}, {loaded[2], loaded[3]}}};
        add_products<TripleBFloat16, false>(sums, j, a, b);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    image_gradient(MutableImage<T> x, Patches p, Regions regions, const uint4* grad_hidden,
                   const uint4* weights, bool by_twos, bool add) {
  __shared__ CellRow rows[kRows];
  __shared__ int pixel_rows[kColumns], pixel_columns[kColumns];
  MGHF_DYNAMIC_SHARED(uint4, slices);
  const int thread = static_cast<int>(threadIdx.x);
  const Place place;
  const Tile tile(regions, static_cast<int>(blockIdx.x % static_cast<unsigned>(regions.tiles)));
  const int64_t first_row =
      static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(regions.tiles)) * kRows;

  if (thread < kRows) {
    const Row row(first_row + thread, p.maps, regions.cells(), p.maps_fastest);
    CellRow& own = rows[thread];
    own.i = static_cast<int>(row.item / regions.cell_columns);
    own.j = static_cast<int>(row.item % regions.cell_columns);
    const int64_t patch = static_cast<int64_t>(own.i) * p.columns + own.j;
    const int64_t patch_row =
        p.maps_fastest ? patch * p.maps + row.map : row.map * p.of_map() + patch;
    own.patch = first_row + thread < p.maps * regions.cells() ? patch_row : -1;
    own.place = first_pixel(x, p.channels, row.map, row.item, regions.cell_columns, p.stride);
  } else {
    const int column = thread - kRows, number = tile.begin + column;
    const bool exists = column < tile.pixels;
    pixel_rows[column] = exists ? tile.row + number / tile.columns : -1;
    pixel_columns[column] = exists ? tile.column + number % tile.columns : -1;
  }
  __syncthreads();

  const int pieces = pieces_of(p.hidden), slices_of_term = pieces / kPiecesOfSlice;
  const int steps = tile.row_terms * tile.column_terms * slices_of_term;
  const auto copy_step = [&](int step) {
    uint4* const left = slices + step % 2 * kSliceSize;
    uint4* const right = left + kLeftSize;
    const int term = step / slices_of_term, first = step % slices_of_term * kPiecesOfSlice;
    const int s = term / tile.column_terms, t = term % tile.column_terms;
    const int64_t back = (static_cast<int64_t>(s) * p.columns + t) * (p.maps_fastest ? p.maps : 1);
    MGHF_UNROLL(1)
    for (int c = thread; c < kRows * kPiecesOfSlice; c += kThreads) {
      const int piece = c % kPiecesOfSlice, row = c / kPiecesOfSlice;
      const CellRow from = rows[row];
      const bool exists = from.patch >= 0 && from.i >= s && from.i - s < p.rows && from.j >= t &&
                          from.j - t < p.columns;
      copy_async<16>(left + piece_at(row, piece),
                     exists ? grad_hidden + (from.patch - back) * pieces + first + piece : weights,
                     exists ? 16 : 0);
    }
    const int offset = (s * p.size + t) * p.stride;
    MGHF_UNROLL(1)
    for (int c = thread; c < kColumns * kPiecesOfSlice; c += kThreads) {
      const int column = c / 2 % kColumns, piece = c / 2 / kColumns * 2 + c % 2;
      const bool exists = pixel_rows[column] >= 0;
      const int pixel = pixel_rows[column] * p.size + pixel_columns[column] + offset;
      const int64_t at =
          (static_cast<int64_t>((first + piece) / 2) * p.pixels() + pixel) * 2 + piece % 2;
      copy_async<16>(right + piece_at(column, piece), exists ? weights + at : weights,
                     exists ? 16 : 0);
    }
    end_copies();
  };

  Sums sums = {};
  if (steps > 0) copy_step(0);
  MGHF_UNROLL(1)
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();  // the slice is there, and the one before it used up
    if (step + 1 < steps) copy_step(step + 1);
    const uint4* const left = slices + step % 2 * kSliceSize;
    multiply_pieces(sums, left, left + kLeftSize, place, tile.pixels - place.warp_column);
  }

  // The rows' cells, the first number of each and what of it is within the image.
  T* cells[kRowTiles][2];
  int heights[kRowTiles][2], widths[kRowTiles][2];
  MGHF_UNROLL_ALL
  for (int i = 0; i < kRowTiles; ++i) {
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      const CellRow row = rows[place.row + 16 * i + 8 * half];
      cells[i][half] = x.data + row.place;
      heights[i][half] = row.patch < 0 ? 0 : static_cast<int>(x.height) - row.i * p.stride;
      widths[i][half] = static_cast<int>(x.width) - row.j * p.stride;
    }
  }
  MGHF_UNROLL_ALL
  for (int j = 0; j < kColumnTiles; ++j) {
    const int column = place.column + 8 * j;
    if (by_twos) {
      const int y = pixel_rows[column], z = pixel_columns[column];
      const int64_t offset = y * x.row_stride + z;
      MGHF_UNROLL_ALL
      for (int i = 0; i < kRowTiles; ++i) {
        MGHF_UNROLL_ALL
        for (int half = 0; half < 2; ++half) {
          if (y < 0 || y >= heights[i][half] || z >= widths[i][half]) continue;
          Two<T>* const target = reinterpret_cast<Two<T>*>(cells[i][half] + offset);
          float first = sums[i][j][2 * half], second = sums[i][j][2 * half + 1];
          if (add) {
            const Two<T> before = *target;
            first += to_float(before.first);
            second += to_float(before.second);
          }
          *target = {from_float<T>(first), from_float<T>(second)};
        }
      }
      continue;
    }
    MGHF_UNROLL_ALL
    for (int c = 0; c < 2; ++c) {
      const int y = pixel_rows[column + c], z = pixel_columns[column + c];
      const int64_t offset = y * x.row_stride + z * x.column_stride;
      MGHF_UNROLL_ALL
      for (int i = 0; i < kRowTiles; ++i) {
        MGHF_UNROLL_ALL
        for (int half = 0; half < 2; ++half) {
          if (y < 0 || y >= heights[i][half] || z >= widths[i][half]) continue;
          T* const target = cells[i][half] + offset;
          const float sum = sums[i][j][2 * half + c];
          *target = from_float<T>(add ? sum + to_float(*target) : sum);
        }
      }
    }
  }
}

// ---- gradients of the weights ----

// partial[split] = left^T [right, 1] over a run of rows: (left_columns, right_columns + 1), of
// which the last column is a bias's gradient. A block has 64 x 64 of it; a warp 32 x 32. kImplicit:
// the right factor is the rows' patches in the image, not a matrix.
//
// d_W1 reads d_h and x, 163 MB (38 us); R 128 1024 = 7.4 G multiply-adds by three products of TF32:
// 148 us. What it copies into shared memory comes there number by number and not ahead of time, so
// that twice this is expected.
constexpr int kOuterThreads = 128;
constexpr int kOuter = 64;
constexpr int kOuterPitch = kOuter + 8;

struct OuterProduct {
  int64_t rows, run;  // rows of a split
  int left_columns, right_columns, splits;

  OuterProduct(int64_t rows, int64_t left, int64_t right)
      : rows(rows),
        left_columns(static_cast<int>(left)),
        right_columns(static_cast<int>(right)) {
    // Enough blocks to fill a GPU, but no more partial results than rows are worth.
    const int64_t most = smaller(smaller(1024 / (tiles() + 1), 64), rows / 256);
    run = up(up(rows, most > 0 ? most : 1), kDepth) * kDepth;
    splits = rows > 0 ? static_cast<int>(up(rows, run)) : 0;
  }
  int64_t tiles() const { return up(left_columns, kOuter) * up(right_columns + 1, kOuter); }
  __host__ __device__ int64_t size() const {
    return static_cast<int64_t>(left_columns) * (right_columns + 1);
  }
};

template <class T, bool kImplicit>
__global__ void __launch_bounds__(kOuterThreads)
    outer_product(Image<T> x, Patches p, OuterProduct o, const float* left_rows,
                  const float* right_rows, float* partial) {
  __shared__ float left[kDepth * kOuterPitch], right[kDepth * kOuterPitch];
  __shared__ int64_t first_pixels[kDepth], pixel_places[kOuter];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
  const int g = thread % kWarp / 4, t = thread % 4;
  const int right_tiles = static_cast<int>(up(o.right_columns + 1, kOuter));
  const int tiles = right_tiles * static_cast<int>(up(o.left_columns, kOuter));
  const int block = static_cast<int>(blockIdx.x), split = block / tiles, tile = block % tiles;
  const int first_m = tile / right_tiles * kOuter, first_n = tile % right_tiles * kOuter;
  const int64_t begin = split * o.run, end = smaller(begin + o.run, o.rows);
  float sums[2][4][4] = {};

  if (kImplicit && thread < kOuter) {
    const int n = first_n + thread;
    pixel_places[thread] = n / p.size * x.row_stride + n % p.size * x.column_stride;
  }
  for (int64_t first = begin; first < end; first += kDepth) {
    __syncthreads();  // the last slice is used up
    if (kImplicit && thread < kDepth) {
      const Row row(first + thread, p.maps, p.of_map(), p.maps_fastest);
      first_pixels[thread] = first_pixel(x, p.channels, row.map, row.item, p.columns, p.stride);
    }
    if (kImplicit) __syncthreads();
    MGHF_UNROLL(4)
    for (int c = thread; c < kDepth * kOuter; c += kOuterThreads) {
      const int k = c / kOuter, m = c % kOuter;
      left[k * kOuterPitch + m] =
          first + k < end ? at_or_zero(left_rows, first + k, o.rows, first_m + m, o.left_columns)
                          : 0.0f;
    }
    // Neighbouring threads read what lies side by side.
    const bool down = kImplicit && p.maps_fastest;
    MGHF_UNROLL(4)
    for (int c = thread; c < kDepth * kOuter; c += kOuterThreads) {
      const int k = down ? c % kDepth : c / kOuter, column = down ? c / kDepth : c % kOuter;
      const int n = first_n + column;
      float value = 0;
      if (first + k < end && n < o.right_columns) {
        if constexpr (kImplicit) {
          value = to_float(x.data[first_pixels[k] + pixel_places[column]]);
        } else {
          value = right_rows[(first + k) * o.right_columns + n];
        }
      } else if (first + k < end && n == o.right_columns) {
        value = 1;
      }
      right[k * kOuterPitch + column] = value;
    }
    __syncthreads();
    MGHF_UNROLL(1)
    for (int k = 0; k < kDepth; k += 8) {
      SplitA a[2];
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        MGHF_UNROLL_ALL
        for (int part = 0; part < 4; ++part) {
          const int m = warp / 2 * 32 + 16 * i + g + part % 2 * 8;
          put(a[i], part, left[(k + t + part / 2 * 4) * kOuterPitch + m]);
        }
      }
      MGHF_UNROLL_ALL
      for (int j = 0; j < 4; j += 2) {
        SplitB b[2];
        MGHF_UNROLL_ALL
        for (int n = 0; n < 4; ++n) {
          const SplitTf32 both(right[(k + t + n % 2 * 4) * kOuterPitch + warp % 2 * 32 +
                                     8 * (j + n / 2) + g]);
          b[n / 2].big[n % 2] = both.big;
          b[n / 2].small[n % 2] = both.small;
        }
        add_products<TripleTf32, false>(sums, j, a, b);
      }
    }
  }

  float* const result = partial + split * o.size();
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    MGHF_UNROLL_ALL
    for (int j = 0; j < 4; ++j) {
      MGHF_UNROLL_ALL
      for (int part = 0; part < 4; ++part) {
        const int64_t m = first_m + warp / 2 * 32 + 16 * i + g + part / 2 * 8;
        const int column_of = first_n + warp % 2 * 32 + 8 * j + 2 * t + part % 2;
        if (m < o.left_columns && column_of <= o.right_columns) {
          result[m * (o.right_columns + 1) + column_of] = sums[i][j][part];
        }
      }
    }
  }
}

// The sum over the splits, in order; the last column is the bias's.
__global__ void __launch_bounds__(kThreads)
    add_splits(OuterProduct o, const float* partial, float* weight, float* bias) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= o.size()) return;
  double sum = 0;
  for (int split = 0; split < o.splits; ++split) {
    sum += static_cast<double>(partial[split * o.size() + i]);
  }
  const int64_t row = i / (o.right_columns + 1), column = i % (o.right_columns + 1);
  float* const target =
      column < o.right_columns ? weight + row * o.right_columns + column : bias + row;
  *target = static_cast<float>(sum);
}

// ---- launches ----

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether a whole vector of numbers lies side by side and aligned wherever one is copied.
template <class T>
bool wide(const Image<T>& x, const Patches& p) {
  constexpr int64_t kWide = 16 / static_cast<int64_t>(sizeof(T));
  const auto fits = [](int64_t size) { return size % kWide == 0; };
  if (!aligned(x.data) || !fits(x.batch_stride) || !fits(x.row_stride)) return false;
  return p.maps_fastest ? x.channel_stride == 1 && fits(p.channels) && fits(x.column_stride)
                        : x.column_stride == 1 && fits(p.size) && fits(p.stride) &&
                              fits(x.channel_stride);
}

// Whether two pixels of a row, from an even column on, lie side by side and aligned.
template <class T>
bool in_twos(const MutableImage<T>& x) {
  return reinterpret_cast<uintptr_t>(x.data) % (2 * sizeof(T)) == 0 && x.column_stride == 1 &&
         (x.row_stride | x.channel_stride | x.batch_stride | x.width) % 2 == 0;
}

// Hands out a workspace in pieces; without memory it counts their bytes.
struct Pieces {
  char* memory = nullptr;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* const result = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += up(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return result;
  }
};

// A layer of the projection, its inputs being the depth, or back, its outputs.
Factor factor_of(const float* weight, int64_t outputs, int64_t inputs, bool back, Pieces& pieces) {
  Factor factor = back ? Factor(weight, inputs, outputs, 1, inputs)
                       : Factor(weight, outputs, inputs, inputs, 1);
  factor.to = pieces.take<uint4>(factor.size());
  return factor;
}

struct ProjectionMemory {
  Factor weight1, weight2;

  ProjectionMemory(const Projection& p, Pieces& pieces)
      : weight1(factor_of(p.weight1, p.hidden, p.pixels(), false, pieces)),
        weight2(factor_of(p.weight2, p.dimension, p.hidden, false, pieces)) {}
};

template <class T>
const char* run_project(const Image<T>& x, const Projection& projection,
                        const ProjectionMemory& memory, float* embedding, int* state,
                        float* hidden_layer, Stream stream) {
  const Patches p(x, projection);
  if (p.number() == 0) return nullptr;
  const char* const error =
      launch(pack, {up(memory.weight1.size() + memory.weight2.size(), kThreads), kThreads}, stream,
             memory.weight1, memory.weight2);
  if (error != nullptr) return error;
  const auto run = [&](auto kernel, int bytes) {
    return launch(kernel, {up(p.number(), kRows), kThreads, static_cast<size_t>(bytes)}, stream, x,
                  p, memory.weight1, projection.bias1, memory.weight2, projection.bias2, embedding,
                  state, hidden_layer);
  };
  constexpr int kWide = 16 / static_cast<int>(sizeof(T));
  if (p.maps_fastest) {
    return run(wide(x, p) ? project<T, true, kWide> : project<T, true, 1>,
               project_bytes<T, true>());
  }
  return run(wide(x, p) ? project<T, false, kWide> : project<T, false, 1>,
             project_bytes<T, false>());
}

struct ImageGradientMemory {
  uint4 *grad_hidden, *weights;
  Factor weight2;

  ImageGradientMemory(const Projection& p, int64_t patches, Pieces& pieces) {
    const int64_t of_row = pieces_of(static_cast<int>(p.hidden));
    grad_hidden = pieces.take<uint4>(patches * of_row);
    weights = pieces.take<uint4>(of_row * p.pixels());
    weight2 = factor_of(p.weight2, p.dimension, p.hidden, true, pieces);
  }
};

struct WeightGradientMemory {
  float *hidden, *grad_hidden, *grad_output, *partial1, *partial2;
  ProjectionMemory projection;
  Factor weight2;

  WeightGradientMemory(const Projection& p, int64_t patches, Pieces& pieces)
      : projection(p, pieces), weight2(factor_of(p.weight2, p.dimension, p.hidden, true, pieces)) {
    const OuterProduct first(patches, p.hidden, p.pixels());
    const OuterProduct second(patches, p.dimension, p.hidden);
    hidden = pieces.take<float>(patches * p.hidden);
    grad_hidden = pieces.take<float>(patches * p.hidden);
    grad_output = pieces.take<float>(patches * p.dimension);
    partial1 = pieces.take<float>(first.splits * first.size());
    partial2 = pieces.take<float>(second.splits * second.size());
  }
};

template <class T, bool kImplicit>
const char* run_outer_product(const Image<T>& x, const Patches& p, const OuterProduct& o,
                              const float* left, const float* right, float* partial, float* weight,
                              float* bias, Stream stream) {
  const char* const error =
      launch(outer_product<T, kImplicit>, {o.splits * o.tiles(), kOuterThreads}, stream, x, p, o,
             left, right, partial);
  if (error != nullptr) return error;
  return launch(add_splits, {up(o.size(), kThreads), kThreads}, stream, o,
                static_cast<const float*>(partial), weight, bias);
}

}  // namespace

int64_t patches_workspace_bytes(const Projection& projection) {
  Pieces pieces;
  ProjectionMemory(projection, pieces);
  return pieces.used;
}

template <class T>
const char* patches(const Image<T>& x, const Projection& projection, float* embedding, int* state,
                    void* workspace, Stream stream) {
  Pieces pieces{static_cast<char*>(workspace)};
  const ProjectionMemory memory(projection, pieces);
  return run_project(x, projection, memory, embedding, state, nullptr, stream);
}

int64_t patches_backward_workspace_bytes(const Projection& projection, int64_t maps, int64_t height,
                                         int64_t width) {
  Pieces pieces;
  ImageGradientMemory(projection, maps * projection.patches(height, width), pieces);
  return pieces.used;
}

template <class T>
const char* patches_backward(const MutableImage<T>& grad_x, bool add, const Projection& projection,
                             const EmbeddingGradient& gradient, void* workspace, Stream stream) {
  const Patches p(grad_x, projection);
  if (p.maps == 0) return nullptr;
  const Regions regions(p, grad_x.height, grad_x.width);
  Pieces pieces{static_cast<char*>(workspace)};
  const ImageGradientMemory memory(projection, p.number(), pieces);
  const int64_t weights =
      static_cast<int64_t>(pieces_of(p.hidden)) * p.pixels() * 2 + memory.weight2.size();
  const char* error = launch(pack_for_gradient, {up(weights, kThreads), kThreads}, stream, p,
                             projection.weight1, reinterpret_cast<uint32_t*>(memory.weights),
                             memory.weight2);
  if (error != nullptr) return error;
  error = launch(hidden_gradient<true>, {up(p.number(), kRows), kThreads}, stream, p, gradient,
                 memory.weight2, reinterpret_cast<uint32_t*>(memory.grad_hidden), nullptr, nullptr);
  if (error != nullptr) return error;
  return launch(image_gradient<T>,
                {up(p.maps * regions.cells(), kRows) * regions.tiles, kThreads,
                 2 * kSliceSize * sizeof(uint4)},
                stream, grad_x, p, regions, static_cast<const uint4*>(memory.grad_hidden),
                static_cast<const uint4*>(memory.weights),
                regions.even(p) && in_twos(grad_x), add);
}

int64_t patches_backward_weights_workspace_bytes(const Projection& projection, int64_t maps,
                                                 int64_t height, int64_t width) {
  Pieces pieces;
  WeightGradientMemory(projection, maps * projection.patches(height, width), pieces);
  return pieces.used;
}

template <class T>
const char* patches_backward_weights(const Image<T>& x, const Projection& projection,
                                     const EmbeddingGradient& gradient,
                                     const ParameterGradients& result, void* workspace,
                                     Stream stream) {
  const Patches p(x, projection);
  Pieces pieces{static_cast<char*>(workspace)};
  const WeightGradientMemory memory(projection, p.number(), pieces);
  const char* error =
      run_project(x, projection, memory.projection, nullptr, nullptr, memory.hidden, stream);
  if (error != nullptr) return error;
  error = launch(pack, {up(memory.weight2.size(), kThreads), kThreads}, stream, memory.weight2,
                 Factor{});
  if (error != nullptr) return error;
  error = launch(hidden_gradient<false>, {up(p.number(), kRows), kThreads}, stream, p, gradient,
                 memory.weight2, nullptr, memory.grad_hidden, memory.grad_output);
  if (error != nullptr) return error;
  error = run_outer_product<T, true>(x, p, {p.number(), p.hidden, p.pixels()}, memory.grad_hidden,
                                     nullptr, memory.partial1, result.weight1, result.bias1,
                                     stream);
  if (error != nullptr) return error;
  return run_outer_product<T, false>(x, p, {p.number(), p.dimension, p.hidden},
                                     memory.grad_output, memory.hidden, memory.partial2,
                                     result.weight2, result.bias2, stream);
}

#define MGHF_PATCHES_OF(T)                                                                       \
  template const char* patches(const Image<T>&, const Projection&, float*, int*, void*, Stream); \
  template const char* patches_backward(const MutableImage<T>&, bool, const Projection&,        \
                                        const EmbeddingGradient&, void*, Stream);               \
  template const char* patches_backward_weights(const Image<T>&, const Projection&,             \
                                                const EmbeddingGradient&,                       \
                                                const ParameterGradients&, void*, Stream)
MGHF_PATCHES_OF(float);
MGHF_PATCHES_OF(Half);
MGHF_PATCHES_OF(BFloat16);

}  // namespace mghf::cuda
