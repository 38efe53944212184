// Batches of matrices on a GPU: (B, rows, columns) of any strides, in elements, and of any of the
// types that images have. The type is a run-time value, because reading matrices is a small part of
// their kernels.
#pragma once

#include <type_traits>

#include "numbers.h"

namespace mghf::cuda {

enum class Element { float32, float16, bfloat16 };

template <class T>
constexpr Element element_of() {
  return sizeof(T) == 4               ? Element::float32
         : std::is_same_v<T, Half> ? Element::float16
                                   : Element::bfloat16;
}

// Calls f with a number of that type.
template <class F>
__device__ __forceinline__ void with_element(Element element, const F& f) {
  switch (element) {
    case Element::float32:
      return f(float{});
    case Element::float16:
      return f(Half{});
    case Element::bfloat16:
      return f(BFloat16{});
  }
}

template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;

  __device__ __forceinline__ float operator()(int64_t i, int64_t j) const {
    return to_float(data[i * row_stride + j * column_stride]);
  }
};

// Number `place` of an array of that type. Less code than with_element(), where speed matters less.
__device__ __forceinline__ float read_element(Element element, const void* from, int64_t place) {
  promise_global(from);
  if (element == Element::float32) return static_cast<const float*>(from)[place];
  const uint16_t bits = static_cast<const uint16_t*>(from)[place];
  return element == Element::float16 ? to_float(Half{bits}) : to_float(BFloat16{bits});
}
__device__ __forceinline__ void write_element(Element element, void* to, int64_t place, float x) {
  promise_global(to);
  if (element == Element::float32) {
    static_cast<float*>(to)[place] = x;
    return;
  }
  const uint32_t half = pair_of<Half>(x, 0), bfloat16 = pair_of<BFloat16>(x, 0);
  static_cast<uint16_t*>(to)[place] =
      static_cast<uint16_t>(element == Element::float16 ? half : bfloat16);
}

struct Matrices {
  const void* data;
  Element element;
  int64_t batch, rows, columns;
  int64_t batch_stride, row_stride, column_stride;
  bool once = false;  // a product with float32 is one of TF32, not three

  // Matrix b, whose elements are T.
  template <class T>
  __device__ __forceinline__ Matrix<T> matrix(int64_t b) const {
    return {static_cast<const T*>(data) + b * batch_stride, row_stride, column_stride};
  }
  // An element of matrix b.
  __device__ __forceinline__ float read(int64_t b, int64_t i, int64_t j) const {
    return read_element(element, data, b * batch_stride + i * row_stride + j * column_stride);
  }
  // `count` of the matrices, from `first` on.
  Matrices part(int64_t first, int64_t count) const {
    Matrices some = *this;
    const int64_t bytes = element == Element::float32 ? 4 : 2;
    some.data = static_cast<const char*>(data) + first * batch_stride * bytes;
    some.batch = count;
    return some;
  }
  // Whether neighbours in a row are closer in memory than those in a column.
  __device__ __forceinline__ bool by_rows() const {
    return column_stride == 1 || row_stride != 1;
  }
};

}  // namespace mghf::cuda
