// The workspace of an op's kernels.
#pragma once

#include "device.h"

namespace mghf::cuda {

// Hands out a workspace in consecutive pieces, each aligned to 16 bytes. Without memory it only
// adds up their sizes. A copy continues from the same point.
class Pieces {
 public:
  explicit Pieces(void* workspace = nullptr) : memory_(static_cast<unsigned char*>(workspace)) {}

  template <class T>
  T* take(int64_t count) {
    unsigned char* const piece = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  unsigned char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace mghf::cuda
