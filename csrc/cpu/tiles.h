// Runs of pixels as float32, in place if the image is stored so, copied otherwise. The views are
// those of merge_rows().
#pragma once

#include "layout.h"
#include "pixels.h"

namespace mghf {
namespace {

// Rows of channels are zero-padded to whole groups, whatever the vectors' length.
constexpr int64_t kGroup = 16;
constexpr int64_t kGroupVectors = kGroup / kLanes;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Channels of one pixel per row.
struct Rows {
  const float* data;
  int64_t step;
  const float* next;  // the next tile if it is worth prefetching, else this one
};

// Prefetches the next tile while one is processed. A tile is read by groups of channels, with long
// strides that hardware prefetchers do not predict. The next tile is prefetched from end to end, at
// every row of a group as much as is read there, which takes a third less time than prefetching in
// the order of use.
inline void fetch(const void* next) { __builtin_prefetch(next, 0, 2); }

// Pixels of a tile, such that it fits the caches beside the results.
inline int64_t tile_pixels(int64_t channels) {
  const int64_t pixels = 16384 / round_up(channels, kGroup) / 16 * 16;
  return pixels < 16 ? 16 : pixels > 128 ? 128 : pixels;
}

inline int64_t tile_floats(int64_t channels) {
  return tile_pixels(channels) * round_up(channels, kGroup);
}

template <class View>
inline bool pixels_in_place(const View& v) {
  return v.kind == ScalarKind::float32 && v.channel_stride == 1 && v.height == 1 &&
         v.channels % kGroup == 0;
}

// Calls run(y, x, pixels, done) for the rows of an image that a run of pixels covers.
template <class View, class Run>
inline void for_each_run(const View& v, int64_t first, int64_t count, const Run& run) {
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / v.width, x = (first + done) % v.width;
    const int64_t rest = v.width - x;
    const int64_t pixels = rest < count - done ? rest : count - done;
    run(y, x, pixels, done);
    done += pixels;
  }
}

// Stores a vector that is a whole cache line without reading that line first, for memory that will
// not be read soon. Call finish_stores() before another thread may read it.
inline void store_past_cache(float* p, Vec x) {
#if defined(__AVX512F__) && defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<Vec*>(p));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(p, x);
#else
  store(p, x);
#endif
}

inline void finish_stores() {
#if defined(__AVX512F__)
  __builtin_ia32_sfence();
#endif
}

// Whether to use store_past_cache(): for whole lines of an image larger than the caches.
inline bool passes_cache(const MutableImageView& v, const float* target) {
  constexpr int64_t cache_floats = 4 << 20;
  return v.batch * v.channels * v.height * v.width > cache_floats &&
         reinterpret_cast<uintptr_t>(target) % sizeof(Vec) == 0;
}

// `count` pixels of image b, at most a tile; `buffer` has room for a tile.
inline Rows pixel_rows(const ImageView& v, int64_t b, int64_t first, int64_t count, float* buffer) {
  if (pixels_in_place(v)) {
    const float* data =
        static_cast<const float*>(v.data) + b * v.batch_stride + first * v.column_stride;
    const bool last = first + 2 * count > v.width;
    return {data, v.column_stride, last ? data : data + count * v.column_stride};
  }
  const int64_t step = round_up(v.channels, kGroup);
  for_each_run(v, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
    float* out = buffer + done * step;
    if (v.kind == ScalarKind::bfloat16 && v.channel_stride == 1) {
      const uint16_t* source = static_cast<const uint16_t*>(v.data) + b * v.batch_stride +
                               y * v.row_stride + x * v.column_stride;
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < v.channels; ++c) {
          out[p * step + c] = to_float(source[p * v.column_stride + c]);
        }
      }
    } else {
      read_pixels(v, b, y, x, pixels, 0, v.channels, out, step);
    }
  });
  if (step > v.channels) {
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = v.channels; c < step; ++c) buffer[p * step + c] = 0;
    }
  }
  return {buffer, step, buffer};
}

// `count` pixels of one map; `buffer` has room for as many.
inline const float* map_run(const ImageView& v, int64_t b, int64_t channel, int64_t first,
                            int64_t count, float* buffer) {
  const int64_t offset = b * v.batch_stride + channel * v.channel_stride;
  if (v.kind == ScalarKind::float32 && v.column_stride == 1 && v.height == 1) {
    return static_cast<const float*>(v.data) + offset + first;
  }
  for_each_run(v, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
    const int64_t start = offset + y * v.row_stride + x * v.column_stride;
    const auto copy = [&](const auto* source) {
      for (int64_t p = 0; p < pixels; ++p) buffer[done + p] = read(source + p * v.column_stride);
    };
    const auto copy_adjacent = [&](const auto* source) {
      for (int64_t p = 0; p < pixels; ++p) buffer[done + p] = read(source + p);
    };
    if (v.kind == ScalarKind::float32) {
      const float* source = static_cast<const float*>(v.data) + start;
      v.column_stride == 1 ? copy_adjacent(source) : copy(source);
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(v.data) + start;
      v.column_stride == 1 ? copy_adjacent(source) : copy(source);
    }
  });
  return buffer;
}

}  // namespace
}  // namespace mghf
