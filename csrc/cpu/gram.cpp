// Gram matrices of feature maps and their gradient, on the CPU. See mghf_fast/reference/gram.py.
//
// Method. The forward takes tiles of pixels as rows of channels, in place if stored so, and
// adds F F^T in blocks of kUpperRows x kUpperVectors that reach to the diagonal or above it; the
// rest is its mirror image. Sums are float32 over kSumPixels, then float64. The gradient,
// (dG + dG^T) F, is a product whose rows are pixels (channels_last) or maps (contiguous).
//
// Floor, for C = 128, 512 x 512: 4.3 G multiply-adds, 2.2 G by symmetry (2.8 G are done, as blocks
// are coarse), and 128 MiB read; twice the memory and no symmetry for the gradient.

#include "arena.h"
#include "gram.h"
#include "overlap.h"

namespace mghf {
namespace {

// Narrower blocks than those of other products, so that they follow the diagonal more closely.
constexpr int kUpperVectors = kBlockVectors == 4 ? 2 : 1;
constexpr int kUpperRows = 12;

int64_t padded(int64_t channels) { return round_up(channels, kGroup); }

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Vec) == 0; }

// ---- forward ----

// Calls visit.template operator()<kM>(m) with blocks of kM rows from m on, then of half as many.
template <int kM, class Visit>
inline void for_each_upper_block(int64_t m, int64_t rows, const Visit& visit) {
  for (; m + kM <= rows; m += kM) visit.template operator()<kM>(m);
  if constexpr (kM > 1) for_each_upper_block<kM / 2>(m, rows, visit);
}

struct SumSpace {
  int64_t channels, tile;
  float* rows;   // [pixel][channel]
  float* total;  // summed over some tiles

  SumSpace(const ImageView& v, Arena& arena)
      : channels(padded(v.channels)), tile(lies_by_maps(v) ? kMapPixels : kProductPixels) {
    rows = arena.floats(tile * channels);
    total = arena.floats(v.channels * channels);
  }
};

void run_sums(const ImageView& view, int64_t b, int64_t first, int64_t pixels, double* sums,
              void* workspace) {
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  const SumSpace space(v, arena);
  const int64_t channels = v.channels, width = space.channels, vectors = width / kLanes;
  for (int64_t i = 0; i < channels * width; ++i) {
    sums[i] = 0;
    space.total[i] = 0;
  }
  for (int64_t done = 0, summed = 0; done < pixels;) {
    const int64_t count = least(space.tile, pixels - done);
    Rows rows = pixel_rows(v, b, first + done, count, space.rows);
    if (!is_aligned(rows.data) || rows.step % kLanes != 0) {
      for (int64_t p = 0; p < count; ++p) {
        __builtin_memcpy(space.rows + p * width, rows.data + p * rows.step,
                         static_cast<size_t>(width) * sizeof(float));
      }
      rows = {space.rows, width, space.rows};
    }
    Streams streams = {{v, b, first + done + count, count}, {}};
    streams.spread(channels, vectors / 2 + 1, count);
    for (int64_t p = 0; p < count; p += kProductPixels) {
      const float* tile = rows.data + p * rows.step;
      const int64_t depth = least(kProductPixels, count - p);
      const auto columns = [&]<int kN>(int64_t n) {
        for_each_upper_block<kUpperRows>(
            0, least(channels, (n + kN) * kLanes), [&]<int kM>(int64_t m) {
              product_block<true, kM, kN>(tile + m, 1, rows.step, tile + n * kLanes, rows.step,
                                          depth, space.total + m * width + n * kLanes, width,
                                          streams);
            });
      };
      int64_t n = 0;
      for (; n + kUpperVectors <= vectors; n += kUpperVectors) {
        columns.template operator()<kUpperVectors>(n);
      }
      for (; n < vectors; ++n) columns.template operator()<1>(n);
    }
    done += count;
    summed += count;
    if (summed >= kSumPixels || done == pixels) {
      move_sums(space.total, sums, channels * width);
      summed = 0;
    }
  }
}

// ---- backward ----

struct GradientSpace {
  int64_t channels, tile;
  float* features;  // by maps [channel][pixel], else [pixel][channel]
  float* out;

  GradientSpace(const ImageView& v, Arena& arena)
      : channels(padded(v.channels)), tile(lies_by_maps(v) ? kMapPixels : kRowPixels) {
    features = arena.floats(tile * channels);
    out = arena.floats(tile * channels);
  }
};

void gradient_of_maps(const GradientSpace& space, const ImageView& v, const MutableImageView& grad,
                      int64_t b, int64_t first, int64_t count, const float* matrix) {
  const int64_t channels = v.channels, tile = space.tile;
  const int64_t vectors = round_up(count, kLanes) / kLanes;
  for (int64_t c = 0; c < channels; ++c) {
    float* row = space.features + c * tile;
    const float* x = map_run(v, b, c, first, count, row);
    if (x != row) __builtin_memcpy(row, x, static_cast<size_t>(count) * sizeof(float));
    for (int64_t p = count; p < vectors * kLanes; ++p) row[p] = 0;
  }
  Streams streams = {{v, b, first + count, count}, {}};
  streams.spread(channels, vectors, channels);
  float* direct = static_cast<float*>(grad.data) + b * grad.batch_stride + first;
  if (grad.kind == ScalarKind::float32 && grad.column_stride == 1 && grad.height == 1 &&
      count % kLanes == 0 && grad.channel_stride % kLanes == 0 && is_aligned(direct)) {
    product<false>(matrix, 1, space.channels, space.features, tile, channels, channels, vectors,
                   direct, grad.channel_stride, streams);
    return;
  }
  product<false>(matrix, 1, space.channels, space.features, tile, channels, channels, vectors,
                 space.out, tile, streams);
  for_each_run(grad, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
    for (int64_t c = 0; c < channels; ++c) {
      write_pixels(grad, b, y, x, pixels, c, 1, space.out + c * tile + done, 1);
    }
  });
}

void gradient_of_rows(const GradientSpace& space, const ImageView& v, const MutableImageView& grad,
                      int64_t b, int64_t first, int64_t count, const float* matrix) {
  const int64_t channels = v.channels, width = space.channels, vectors = width / kLanes;
  const Rows rows = pixel_rows(v, b, first, count, space.features);
  Streams streams = {{v, b, first + count, count}, {}};
  streams.spread(count, vectors, channels);
  float* direct =
      static_cast<float*>(grad.data) + b * grad.batch_stride + first * grad.column_stride;
  if (pixels_in_place(grad) && grad.column_stride % kLanes == 0 && is_aligned(direct)) {
    product<false>(rows.data, rows.step, 1, matrix, width, channels, count, vectors, direct,
                   grad.column_stride, streams);
    return;
  }
  product<false>(rows.data, rows.step, 1, matrix, width, channels, count, vectors, space.out, width,
                 streams);
  for_each_run(grad, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
    write_pixels(grad, b, y, x, pixels, 0, channels, space.out + done * width, width);
  });
}

void run_gradient(const ImageView& view, const MutableImageView& grad_view, int64_t b,
                  int64_t first, int64_t pixels, const float* matrix, void* workspace) {
  const ImageView v = merge_rows(view);
  const MutableImageView grad = merge_rows(grad_view);
  Arena arena{static_cast<char*>(workspace)};
  const GradientSpace space(v, arena);
  const auto gradient = lies_by_maps(v) ? gradient_of_maps : gradient_of_rows;
  for (int64_t done = 0; done < pixels; done += space.tile) {
    gradient(space, v, grad, b, first + done, least(space.tile, pixels - done), matrix);
  }
}

// ---- entry points ----

size_t workspace_bytes(const ImageView& view) {
  Arena sums{nullptr}, gradient{nullptr};
  SumSpace(view, sums);
  GradientSpace(view, gradient);
  return sums.used > gradient.used ? sums.used : gradient.used;
}

}  // namespace

const GramKernels MGHF_KERNELS = {padded, workspace_bytes, run_sums, run_gradient};

}  // namespace mghf
