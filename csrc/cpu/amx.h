// AMX tiles for products of bfloat16, or the same in plain C++, so that the kernels which use them
// can be tested on any machine (MGHF_EMULATE_AMX).
#pragma once

#include <cstdint>

namespace mghf {
namespace {

// The tiles of a block of two by two: 16 rows of 64 bytes each. 0 to 3 hold the sums, 4 and 5 rows
// of a, 6 and 7 columns of b.
constexpr int kTileRows = 16, kTileBytes = 64;

#if defined(MGHF_EMULATE_AMX)

thread_local float tiles[8][kTileRows][kTileBytes / sizeof(float)];

struct Tiles {};

template <int tile>
inline void tile_zero() {
  __builtin_memset(tiles[tile], 0, sizeof tiles[tile]);
}
template <int tile>
inline void tile_load(const void* data, int64_t row_bytes) {
  for (int row = 0; row < kTileRows; ++row) {
    const char* source = static_cast<const char*>(data) + row * row_bytes;
    __builtin_memcpy(tiles[tile][row], source, kTileBytes);
  }
}
template <int tile>
inline void tile_store(void* data, int64_t row_bytes) {
  for (int row = 0; row < kTileRows; ++row) {
    __builtin_memcpy(static_cast<char*>(data) + row * row_bytes, tiles[tile][row], kTileBytes);
  }
}
template <int sums, int a, int b>
inline void tile_multiply_add() {
  const auto value = [](const float& pair, int second) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, pair);
    return __builtin_bit_cast(float, second != 0 ? bits & 0xffff0000u : bits << 16);
  };
  for (int row = 0; row < kTileRows; ++row) {
    for (int pair = 0; pair < 16; ++pair) {
      for (int column = 0; column < 16; ++column) {
        for (int second = 0; second < 2; ++second) {
          tiles[sums][row][column] +=
              value(tiles[a][row][pair], second) * value(tiles[b][pair][column], second);
        }
      }
    }
  }
}

#else

// Assembler, because the compilers' intrinsics accept only literals as tile numbers.

// Configures the tiles' shapes for the lifetime of the object.
struct Tiles {
  Tiles() {
    alignas(64) struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes[16];
      uint8_t rows[16];
    } shapes = {};
    shapes.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.bytes[tile] = kTileBytes;
      shapes.rows[tile] = kTileRows;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int tile>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
inline void tile_load(const void* data, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(data), "r"(row_bytes), "i"(tile)
                   : "memory");
}
template <int tile>
inline void tile_store(void* data, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(data), "r"(row_bytes), "i"(tile)
                   : "memory");
}
template <int sums, int a, int b>
inline void tile_multiply_add() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

#endif

}  // namespace
}  // namespace mghf
