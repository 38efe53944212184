// Pieces of one workspace.
#pragma once

#include "vector.h"

namespace mghf {
namespace {

// Hands out 64-byte aligned pieces of the caller's workspace; with a null base it counts bytes.
struct Arena {
  char* base;
  size_t used = 0;

  float* floats(int64_t count) {
    float* piece = reinterpret_cast<float*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(float)), 64));
    return piece;
  }
};

}  // namespace
}  // namespace mghf
