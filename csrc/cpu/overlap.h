// Matrix products over pixels that prefetch the next tile while they compute; otherwise memory and
// arithmetic would wait for each other.
#pragma once

#include "product.h"
#include "tiles.h"

namespace mghf {
namespace {

constexpr int64_t kProductPixels = 64;  // whose operands stay in the L1 cache
constexpr int64_t kSumPixels = 512;     // summed in float32, then in float64
constexpr int64_t kMapPixels = 256;     // of many maps at a time
constexpr int64_t kRowPixels = 48;      // of rows of channels that are multiplied with a matrix
constexpr int64_t kStepDepth = 8;       // of a product, between two groups of prefetches
constexpr int64_t kLineBytes = 64;

// The cache lines of an image that a tile reads.
struct Stream {
  const char* data = nullptr;
  int64_t row_bytes = 0, rows = 0, lines = 0;  // rows of so many cache lines
  const int64_t* index = nullptr;              // which rows, if not all
  int64_t row = 0, line = 0;

  Stream() = default;

  // Those of all channels of `pixels`.
  Stream(const ImageView& v, int64_t b, int64_t first, int64_t pixels)
      : Stream(v, b, first, pixels, nullptr, v.channels) {}

  // Those of at least these channels.
  Stream(const ImageView& v, int64_t b, int64_t first, int64_t pixels, const int64_t* channels,
         int64_t count) {
    if (v.height > 1 || first >= v.width) return;
    const int64_t bytes = v.kind == ScalarKind::float32 ? 4 : 2;
    const int64_t length = least(pixels, v.width - first) * v.column_stride * bytes;
    data = static_cast<const char*>(v.data) +
           (b * v.batch_stride + first * v.column_stride) * bytes;
    if (v.channel_stride == 1) {
      rows = 1;
    } else if (v.column_stride == 1) {
      rows = count;
      row_bytes = v.channel_stride * bytes;
      index = channels;
    }
    lines = (length + kLineBytes - 1) / kLineBytes;
  }

  int64_t total() const { return rows * lines; }

  void fetch_lines(int64_t count) {
    for (; count > 0 && row < rows; --count) {
      const int64_t r = index == nullptr ? row : index[row];
      fetch(data + r * row_bytes + line * kLineBytes);
      if (++line == lines) {
        line = 0;
        ++row;
      }
    }
  }
};

// Prefetches a tile of one image or of two.
struct Streams {
  Stream first, second;
  int64_t share = 0;  // lines of each at a time

  // Spreads the prefetches over a product with about `rows` x `vectors` results.
  void spread(int64_t rows, int64_t vectors, int64_t depth) {
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows *
                           ((vectors + kBlockVectors - 1) / kBlockVectors);
    const int64_t steps = blocks * (depth / kStepDepth) + 1;
    const int64_t lines = first.total() > second.total() ? first.total() : second.total();
    share = (lines + steps - 1) / steps;
  }

  void fetch_share() {
    first.fetch_lines(share);
    second.fetch_lines(share);
  }
};

// A block of out = a b or out += a b; a and b as in multiply_add(), whose loop this is, with the
// prefetches added. The product is summed separately before it is added, so long sums lose fewer
// digits.
template <bool kAdd, int kM, int kN>
__attribute__((noinline)) void product_block(const float* a, int64_t a_row, int64_t a_step,
                                             const float* b, int64_t b_step, int64_t depth,
                                             float* out, int64_t out_step, Streams& streams) {
  Vec block[kM][kN] = {};
  for (int64_t done = 0; done < depth; done += kStepDepth) {
    streams.fetch_share();
    for (int64_t k = least(kStepDepth, depth - done); k > 0; --k) {
      Vec columns[kN];
#pragma GCC unroll 16
      for (int n = 0; n < kN; ++n) columns[n] = at(b + n * kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const Vec row = splat(a[m * a_row]);
#pragma GCC unroll 16
        for (int n = 0; n < kN; ++n) block[m][n] += row * columns[n];
      }
      a += a_step;
      b += b_step;
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 16
    for (int n = 0; n < kN; ++n) {
      Vec& result = at(out + m * out_step + n * kLanes);
      result = kAdd ? result + block[m][n] : block[m][n];
    }
  }
}

// The whole product, rows x vectors.
template <bool kAdd>
inline void product(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                    int64_t depth, int64_t rows, int64_t vectors, float* out, int64_t out_step,
                    Streams& streams) {
  for_each_block(rows, vectors, [&]<int kM, int kN>(int64_t m, int64_t n) {
    product_block<kAdd, kM, kN>(a + m * a_row, a_row, a_step, b + n * kLanes, b_step, depth,
                                out + m * out_step + n * kLanes, out_step, streams);
  });
}

// Adds float32 sums to float64 ones and clears them.
inline void move_sums(float* from, double* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += static_cast<double>(from[i]);
    from[i] = 0;
  }
}

}  // namespace
}  // namespace mghf
