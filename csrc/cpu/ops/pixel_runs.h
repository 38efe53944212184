// How ops that sum over pixels divide a stack among threads, and memory for the partial sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "../image.h"

namespace mghf {

// Uninitialised, 64-byte aligned memory of a call.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T), alignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Release {
    void operator()(T* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<T, Release> data_;
};

// The runs of a stack's pixels that threads work on; they depend on its shape alone.
struct PixelRuns {
  int64_t pixels, count, length;

  // Runs of about `target` pixels, at most `most` in all images together, but at least one in each.
  PixelRuns(const ImageView& x, int64_t target, int64_t most) : pixels(x.height * x.width) {
    const int64_t limit = std::max<int64_t>(1, most / std::max<int64_t>(1, x.batch));
    count = std::clamp<int64_t>(pixels / target, 1, limit);
    length = (pixels + count - 1) / count;
    count = (pixels + length - 1) / length;
  }
  int64_t begin(int64_t run) const { return run * length; }
  int64_t size(int64_t run) const { return std::min(length, pixels - begin(run)); }
};

}  // namespace mghf
