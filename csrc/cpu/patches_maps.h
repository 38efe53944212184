// Groups of maps, the lanes of the kernels of `patches`: reading, writing, prefetching.
#pragma once

#include "arena.h"
#include "patch_product.h"
#include "patches.h"
#include "pixels.h"
#include "product.h"
#include "vector.h"

namespace mghf {
namespace {

// ---- groups of maps ----

inline int64_t groups(const PatchesOptions& o) { return (o.maps + kLanes - 1) / kLanes; }

struct Group {
  int64_t first, count;  // maps

  Group(const PatchesOptions& o, int64_t index)
      : first(index * kLanes), count(o.maps - first < kLanes ? o.maps - first : kLanes) {}
};

// A group may cross images: calls visit(image, channel, lane, channels) for each of its pieces
// within one image.
template <class Visit>
inline void for_each_piece(const Group& group, int64_t channels, const Visit& visit) {
  for (int64_t lane = 0; lane < group.count;) {
    const int64_t map = group.first + lane, channel = map % channels;
    const int64_t rest = group.count - lane, here = channels - channel;
    const int64_t piece = here < rest ? here : rest;
    visit(map / channels, channel, lane, piece);
    lane += piece;
  }
}

// A whole group of contiguous channels, whose number the compiler knows.
template <class T>
inline void read_whole(const T* source, int64_t pixel_step, int64_t pixels, float* out) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      out[p * kLanes + lane] = read(source + p * pixel_step + lane);
    }
  }
}

template <class T>
inline void write_whole(T* target, int64_t pixel_step, int64_t pixels, const float* in) {
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      write(target + p * pixel_step + lane, in[p * kLanes + lane]);
    }
  }
}

// Reads a run of pixels of a group of maps into out[pixel][lane].
inline void read_group(const ImageView& v, const Group& group, int64_t y, int64_t x,
                       int64_t pixels, float* out) {
  for_each_piece(group, v.channels, [&](int64_t b, int64_t channel, int64_t lane, int64_t count) {
    if (count < kLanes || v.channel_stride != 1) {
      read_pixels(v, b, y, x, pixels, channel, count, out + lane, kLanes);
      return;
    }
    const int64_t offset =
        b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel;
    if (v.kind == ScalarKind::float32) {
      read_whole(static_cast<const float*>(v.data) + offset, v.column_stride, pixels, out);
    } else {
      read_whole(static_cast<const uint16_t*>(v.data) + offset, v.column_stride, pixels, out);
    }
  });
}

inline void write_group(const MutableImageView& v, const Group& group, int64_t y, int64_t x,
                        int64_t pixels, const float* in) {
  for_each_piece(group, v.channels, [&](int64_t b, int64_t channel, int64_t lane, int64_t count) {
    if (count < kLanes || v.channel_stride != 1) {
      write_pixels(v, b, y, x, pixels, channel, count, in + lane, kLanes);
      return;
    }
    const int64_t offset =
        b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel;
    if (v.kind == ScalarKind::float32) {
      write_whole(static_cast<float*>(v.data) + offset, v.column_stride, pixels, in);
    } else {
      write_whole(static_cast<uint16_t*>(v.data) + offset, v.column_stride, pixels, in);
    }
  });
}

// Clears lanes without maps, so that no arithmetic uses uninitialised memory.
inline void clear(float* data, int64_t floats) {
  if (floats == 0) return;  // data may be null, which memset does not allow
  __builtin_memset(data, 0, static_cast<size_t>(floats) * sizeof(float));
}

// ---- prefetching ----

// Prefetches a few rows of a group of maps, a few cache lines at a time.
class Prefetch {
 public:
  static Prefetch nothing() { return {}; }

  template <class Data>
  Prefetch(const BasicImageView<Data>& v, const Group& group, int64_t y, int64_t x, int64_t rows,
        int64_t pixels)
      : rows_(rows) {
    const int64_t size = v.kind == ScalarKind::float32 ? 4 : 2;
    const int64_t b = group.first / v.channels, channel = group.first % v.channels;
    base_ = static_cast<const char*>(v.data) +
            (b * v.batch_stride + channel * v.channel_stride + y * v.row_stride +
             x * v.column_stride) * size;
    row_step_ = v.row_stride * size;
    if (v.channel_stride == 1) {
      maps_ = 1;
      items_ = pixels;
      item_step_ = v.column_stride * size;
    } else if (v.column_stride == 1) {
      const int64_t here = v.channels - channel;
      maps_ = group.count < here ? group.count : here;
      map_step_ = v.channel_stride * size;
      item_step_ = 64;
      items_ = (pixels * size + 63) / 64;
    } else {
      rows_ = 0;
    }
  }

  // The number of requests.
  int64_t size() const { return rows_ * maps_ * items_; }

  template <bool kWrite>
  void request(int64_t count) {
    for (; count > 0 && row_ < rows_; --count) {
      __builtin_prefetch(base_ + row_ * row_step_ + map_ * map_step_ + item_ * item_step_, kWrite,
                         kWrite ? 3 : 2);
      if (++item_ < items_) continue;
      item_ = 0;
      if (++map_ < maps_) continue;
      map_ = 0;
      ++row_;
    }
  }

 private:
  Prefetch() = default;

  const char* base_ = nullptr;
  int64_t rows_ = 0, maps_ = 0, items_ = 0;
  int64_t row_step_ = 0, map_step_ = 0, item_step_ = 0;
  int64_t row_ = 0, map_ = 0, item_ = 0;
};

#if defined(MGHF_AMX)
inline bool tiles_fit(const PatchesOptions& o) {
  return o.patch_size % (2 * kTileWords) == 0 && o.hidden % (2 * kTileWords) == 0;
}
#endif

}  // namespace
}  // namespace mghf
