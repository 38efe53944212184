// Runs of pixels between an image of any layout and a buffer [pixel][channel] of float32.
#pragma once

#include "image.h"
#include "vector.h"

namespace mghf {
namespace {

inline float to_float(uint16_t bfloat16) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(bfloat16) << 16);
}

// Rounds to nearest, ties to even, as PyTorch does; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float read(const float* p) { return *p; }
inline float read(const uint16_t* p) { return to_float(*p); }
inline void write(float* p, float x) { *p = x; }
inline void write(uint16_t* p, float x) { *p = to_bfloat16(x); }

#if defined(__AVX512F__)
// (c, p) -> (p, c) for 16 x 16 values, four rounds of exchanging halves.
inline void transpose_block(const float* source, int64_t source_step, float* target,
                            int64_t target_step) {
  Vec rows[kLanes], other[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) rows[i] = load(source + i * source_step);
  const auto exchange = [](Vec(&from)[kLanes], Vec(&to)[kLanes], int width) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & width) continue;
      IntVec low, high;
#pragma GCC unroll 16
      for (int lane = 0; lane < 16; ++lane) {
        const bool second = lane & width;
        low[lane] = second ? 16 + (lane - width) : lane;
        high[lane] = second ? 16 + lane : lane + width;
      }
      to[i] = __builtin_shuffle(from[i], from[i + width], low);
      to[i + width] = __builtin_shuffle(from[i], from[i + width], high);
    }
  };
  exchange(rows, other, 8);
  exchange(other, rows, 4);
  exchange(rows, other, 2);
  exchange(other, rows, 1);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(target + i * target_step, rows[i]);
}
#endif

template <class T>
void read_pixels(const T* source, int64_t pixel_step, int64_t channel_step, int64_t pixels,
                 int64_t channels, float* out, int64_t out_step) {
  int64_t done_pixels = 0, done_channels = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (channel_step == 1) {
      for (int64_t p = 0; p < pixels; ++p) {
        __builtin_memcpy(out + p * out_step, source + p * pixel_step,
                         static_cast<size_t>(channels) * sizeof(float));
      }
      return;
    }
#if defined(__AVX512F__)
    if (pixel_step == 1) {
      done_pixels = pixels / 16 * 16;
      done_channels = channels / 16 * 16;
      for (int64_t c = 0; c < done_channels; c += 16) {
        for (int64_t p = 0; p < done_pixels; p += 16) {
          transpose_block(source + c * channel_step + p, channel_step, out + p * out_step + c,
                          out_step);
        }
      }
    }
#endif
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = c < done_channels ? done_pixels : 0; p < pixels; ++p) {
      out[p * out_step + c] = read(source + p * pixel_step + c * channel_step);
    }
  }
}

template <class T>
void write_pixels(T* target, int64_t pixel_step, int64_t channel_step, int64_t pixels,
                  int64_t channels, const float* in, int64_t in_step) {
  int64_t done_pixels = 0, done_channels = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (channel_step == 1) {
      for (int64_t p = 0; p < pixels; ++p) {
        __builtin_memcpy(target + p * pixel_step, in + p * in_step,
                         static_cast<size_t>(channels) * sizeof(float));
      }
      return;
    }
#if defined(__AVX512F__)
    if (pixel_step == 1) {
      done_pixels = pixels / 16 * 16;
      done_channels = channels / 16 * 16;
      for (int64_t c = 0; c < done_channels; c += 16) {
        for (int64_t p = 0; p < done_pixels; p += 16) {
          transpose_block(in + p * in_step + c, in_step, target + c * channel_step + p,
                          channel_step);
        }
      }
    }
#endif
  }
  if (channel_step == 1) {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        write(target + p * pixel_step + c, in[p * in_step + c]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = c < done_channels ? done_pixels : 0; p < pixels; ++p) {
      write(target + p * pixel_step + c * channel_step, in[p * in_step + c]);
    }
  }
}

// Reads `pixels` of row y from column x on, `channels` from `channel` on, of image b into
// out[pixel * out_step + channel].
inline void read_pixels(const ImageView& v, int64_t b, int64_t y, int64_t x, int64_t pixels,
                        int64_t channel, int64_t channels, float* out, int64_t out_step) {
  const int64_t offset =
      b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel * v.channel_stride;
  if (v.kind == ScalarKind::float32) {
    read_pixels(static_cast<const float*>(v.data) + offset, v.column_stride, v.channel_stride,
                pixels, channels, out, out_step);
  } else {
    read_pixels(static_cast<const uint16_t*>(v.data) + offset, v.column_stride, v.channel_stride,
                pixels, channels, out, out_step);
  }
}

// The inverse of read_pixels().
inline void write_pixels(const MutableImageView& v, int64_t b, int64_t y, int64_t x,
                         int64_t pixels, int64_t channel, int64_t channels, const float* in,
                         int64_t in_step) {
  const int64_t offset =
      b * v.batch_stride + y * v.row_stride + x * v.column_stride + channel * v.channel_stride;
  if (v.kind == ScalarKind::float32) {
    write_pixels(static_cast<float*>(v.data) + offset, v.column_stride, v.channel_stride, pixels,
                 channels, in, in_step);
  } else {
    write_pixels(static_cast<uint16_t*>(v.data) + offset, v.column_stride, v.channel_stride,
                 pixels, channels, in, in_step);
  }
}

}  // namespace
}  // namespace mghf
