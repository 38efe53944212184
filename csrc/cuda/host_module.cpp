// The CUDA kernels on the host, for Python: numpy arrays of any strides, float32, float16, or uint16
// for the bits of bfloat16.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "entropy.h"
#include "planted.h"

namespace py = pybind11;

namespace {

using namespace mghf::cuda;

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

template <class T>
Image<T> image_of(const py::array& x) {
  if (x.ndim() != 4) throw std::invalid_argument("x is not (B, C, H, W)");
  const auto stride = [&](int d) { return static_cast<int64_t>(x.strides(d)) / x.itemsize(); };
  return {static_cast<const T*>(x.data()), x.shape(0), x.shape(1), x.shape(2), x.shape(3),
          stride(0), stride(1), stride(2), stride(3)};
}

// Calls f with the image in its type.
template <class F>
void with_image(const py::array& x, const F& f) {
  const std::string type = py::str(x.dtype());
  if (type == "float32") return f(image_of<float>(x));
  if (type == "float16") return f(image_of<Half>(x));
  if (type == "uint16") return f(image_of<BFloat16>(x));
  throw std::invalid_argument("x is " + type + "; allowed are float32, float16, uint16");
}

py::array_t<float> entropy_of(const py::array& x, int64_t bins) {
  py::array_t<float> result({x.shape(0), x.shape(1)});
  with_image(x, [&](const auto& image) {
    std::vector<double> workspace(
        entropy_workspace_bytes(image.batch * image.channels, image.pixels(), bins) / 8 + 1);
    check(entropy(image, bins, result.mutable_data(), workspace.data(), nullptr));
  });
  return result;
}

py::array_t<int> race_of(const py::array_t<int>& x, bool barrier) {
  py::array_t<int> result(64);
  check(planted_race(x.data(), result.mutable_data(), barrier, nullptr));
  return result;
}

py::array_t<int> index_of(const py::array_t<int>& x, int first) {
  py::array_t<int> result(64);
  check(planted_index(x.data(), result.mutable_data(), first, nullptr));
  return result;
}

}  // namespace

PYBIND11_MODULE(mghf_fast_cuda_host, m) {
  m.def("entropy", &entropy_of);
  m.def("planted_race", &race_of);
  m.def("planted_index", &index_of);
}
