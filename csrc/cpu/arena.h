// Pieces of one workspace.
#pragma once

#include "vector.h"

namespace mghf {
namespace {

// Hands out 64-byte aligned pieces of the caller's workspace; with a null base it counts bytes.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  float* floats(int64_t count) { return take<float>(count); }
};

}  // namespace
}  // namespace mghf
