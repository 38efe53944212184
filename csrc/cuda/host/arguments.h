// Numpy arrays as the kernels' images: any strides, float32, float16, or uint16 for the bits of
// bfloat16.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../image.h"

namespace mghf::cuda {

namespace py = pybind11;

inline void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

template <class T>
Image<T> image_of(const py::array& x) {
  if (x.ndim() != 4) throw std::invalid_argument("x is not (B, C, H, W)");
  const auto stride = [&](int d) { return static_cast<int64_t>(x.strides(d)) / x.itemsize(); };
  return {static_cast<const T*>(x.data()), x.shape(0), x.shape(1), x.shape(2), x.shape(3),
          stride(0), stride(1), stride(2), stride(3)};
}

template <class T>
MutableImage<T> mutable_image_of(py::array& x) {
  const Image<T> read = image_of<T>(x);
  return {static_cast<T*>(x.mutable_data()), read.batch, read.channels, read.height, read.width,
          read.batch_stride, read.channel_stride, read.row_stride, read.column_stride};
}

// Of the size, type and layout of an image, with `channels`; contiguous unless it is channels_last.
inline py::array new_image_like(const py::array& x, py::ssize_t channels) {
  const py::ssize_t b = x.shape(0), c = channels, h = x.shape(2), w = x.shape(3);
  const py::ssize_t size = x.itemsize();
  const bool last = x.shape(1) > 1 && x.strides(1) == size && x.strides(3) == x.shape(1) * size;
  const std::vector<py::ssize_t> strides =
      last ? std::vector<py::ssize_t>{h * w * c * size, size, w * c * size, c * size}
           : std::vector<py::ssize_t>{c * h * w * size, h * w * size, w * size, size};
  return py::array(x.dtype(), {b, c, h, w}, strides);
}

// Calls f with an element of the array's type.
template <class F>
void with_type(const py::array& x, const F& f) {
  const std::string type = py::str(x.dtype());
  if (type == "float32") return f(float{});
  if (type == "float16") return f(Half{});
  if (type == "uint16") return f(BFloat16{});
  throw std::invalid_argument("x is " + type + "; allowed are float32, float16, uint16");
}

// Calls f with the image in its type.
template <class F>
void with_image(const py::array& x, const F& f) {
  with_type(x, [&](auto element) { f(image_of<decltype(element)>(x)); });
}

// Memory for a workspace, aligned to 16 bytes and full of NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : words_(host::counting.on ? 0 : static_cast<size_t>(bytes) / sizeof(Word) + 1) {
    if (host::counting.on) {
      host::counting.workspace_bytes += bytes;
      return;
    }
    std::memset(words_.data(), 0xff, words_.size() * sizeof(Word));
  }
  void* get() { return words_.data(); }

 private:
  struct alignas(16) Word {
    unsigned char bytes[16];
  };
  std::vector<Word> words_;
};

}  // namespace mghf::cuda
