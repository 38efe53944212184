// The gradient of the image; see patches.cu.
#pragma once

#include "patches_hidden.h"

namespace mghf::cuda {

namespace {

// Splits W1 into [8 units][pixel][piece], and the factor of d_y.
__global__ void __launch_bounds__(kThreads)
    pack_for_gradient(int all_pixels, int hidden, const float* weight1, uint32_t* pieces,
                      Factor weight2) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = all_pixels, count = pieces_of(hidden) * pixels * 2;
  if (i < count) {
    const int64_t unit = i / 4 / pixels * 8 + i % 4 * 2, pixel = i / 4 % pixels;
    const SplitPair pair(at_or_zero(weight1, unit, hidden, pixel, pixels),
                         at_or_zero(weight1, unit + 1, hidden, pixel, pixels));
    uint32_t* const to = pieces + i / 4 * 8 + i % 4;
    to[0] = pair.big;
    to[4] = pair.small;
  } else if (i - count < weight2.size()) {
    weight2.pack(i - count);
  }
}

// The image consists of cells of stride x stride pixels. Pixel (r, p) of cell (i, j) is pixel
// (r + s stride, p + t stride) of patch (i - s, j - t), for all s, t that stay within the patch:
//   d_x = sum_st sum_h W1[h][r + s stride][p + t stride] d_h[i - s, j - t][h]
//
// A product for each s, t: rows are pairs of a cell and a map, columns are 128 pixels of the cell.
// Vertically `terms` patches cover a cell's first rows of pixels, one less the other rows; likewise
// horizontally with its first columns. A block's pixels are from one of these four regions, so no
// weights are padded with zeros (through which a NaN of another patch would get in). Every pixel is
// written once, or added to once. Slices of 32 hidden units, of d_h and of W1, are double-buffered.
//
// Predicted: writes the gradient (134 MB, 31 us; adding also reads it, 62 us). R 128 1024 = 7.4 G
// multiply-adds by three products of bfloat16: 74 us. The five tiles of 128 rows take 640 KB of d_h
// and 512 KB of W1 from the second-level cache, all rows 0.56 GB: about 100 us at 5.5 TB/s, which
// bounds it.
struct Regions {
  int terms;                  // patches that cover a cell's first pixels, per direction
  int height, width;          // of a cell
  int top, left;              // rows and columns with `terms` patches
  int first[4], tiles;        // the regions' first tiles: top left, top right, bottom left, right
  int cell_rows, cell_columns;
  int of_tile;  // pixels

  Regions(const Patches& p, int64_t image_height, int64_t image_width)
      : Regions(p.size, p.stride, image_height, image_width, kColumns) {}
  Regions(int64_t size, int64_t stride, int64_t image_height, int64_t image_width, int of_tile)
      : terms(static_cast<int>(up(size, stride))),
        height(static_cast<int>(smaller(stride, image_height))),
        width(static_cast<int>(smaller(stride, image_width))),
        top(static_cast<int>(smaller(size - (terms - 1) * stride, height))),
        left(static_cast<int>(smaller(size - (terms - 1) * stride, width))),
        cell_rows(static_cast<int>(up(image_height, stride))),
        cell_columns(static_cast<int>(up(image_width, stride))),
        of_tile(of_tile) {
    const int sizes[4] = {top * left, top * (width - left), (height - top) * left,
                          (height - top) * (width - left)};
    tiles = 0;
    for (int i = 0; i < 4; ++i) {
      first[i] = tiles;
      tiles += static_cast<int>(up(sizes[i], of_tile));
    }
  }
  __host__ __device__ int64_t cells() const {
    return static_cast<int64_t>(cell_rows) * cell_columns;
  }
  // Whether pixels of a cell may be taken in pairs.
  bool even(const Patches& p) const {
    return (p.size | p.stride | width | left) % 2 == 0;
  }
};

// A block's tile: `pixels` pixels from number `begin` on of a region.
struct Tile {
  int row, column, columns;  // of the region
  int begin, pixels;
  int row_terms, column_terms;

  __host__ __device__ __forceinline__ Tile(const Regions& regions, int tile) {
    const bool below = tile >= regions.first[2];
    const bool right = tile >= regions.first[3] || (tile >= regions.first[1] && !below);
    const int first = right ? (below ? regions.first[3] : regions.first[1])
                            : (below ? regions.first[2] : 0);
    row = below ? regions.top : 0;
    column = right ? regions.left : 0;
    columns = right ? regions.width - regions.left : regions.left;
    row_terms = regions.terms - (below ? 1 : 0);
    column_terms = regions.terms - (right ? 1 : 0);
    begin = (tile - first) * regions.of_tile;
    const int rest = (below ? regions.height - regions.top : regions.top) * columns - begin;
    pixels = rest < regions.of_tile ? rest : regions.of_tile;
  }
  __host__ __device__ int terms() const { return row_terms * column_terms; }
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

// Index of a piece of a row or a column: [row][piece], with a different order of the pieces in each
// of eight rows, so that the same piece of all of them is spread over all banks.
__device__ __forceinline__ int piece_at(int row, int piece) {
  return row * kPiecesOfSlice + (piece ^ (row & 7));
}
static_assert(kPiecesOfSlice == 8);
constexpr int kLeftSize = kRows * kPiecesOfSlice;
constexpr int kSliceSize = kLeftSize + kColumns * kPiecesOfSlice;

template <bool kOnce>
__device__ __forceinline__ void multiply_pieces(Sums& sums, const uint4* left, const uint4* right,
                                                const ThreadPlace& place, int columns) {
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
      if constexpr (!kOnce) load_matrices(a[i].small, left + piece_at(row, piece + 1));
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
        add_products<TripleBFloat16, false, kOnce>(sums, j, a, b);
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
  const ThreadPlace place;
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
    __syncthreads();  // the slice is complete, the previous one has been used
    if (step + 1 < steps) copy_step(step + 1);
    const uint4* const left = slices + step % 2 * kSliceSize;
    const int columns = tile.pixels - place.warp_column;
    if (p.once_in_halves) {
      multiply_pieces<true>(sums, left, left + kLeftSize, place, columns);
    } else {
      multiply_pieces<false>(sums, left, left + kLeftSize, place, columns);
    }
  }

  // The rows' cells: the first element of each, and the part of it within the image.
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

}  // namespace

}  // namespace mghf::cuda
