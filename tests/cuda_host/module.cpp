// The emulator's functions for tests, and the planted faults, for Python. The ops themselves are
// not here: this library registers them with PyTorch as csrc/ops and csrc/cuda/ops do everywhere,
// in the namespace `mghf_cuda_host`.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/coupling.h"
#include "../../csrc/cuda/coupling_weights.h"
#include "../../csrc/cuda/dec.h"
#include "../../csrc/cuda/halves.h"
#include "../../csrc/cuda/mma.h"
#include "../../csrc/cuda/variants.h"
#include "planted.h"
#include "products.h"

namespace py = pybind11;
using namespace mghf::cuda;

namespace {

using Planted = const char* (*)(const int* x, int* result, int fault, Stream);

template <Planted kKernel>
py::array_t<int> run(const py::array_t<int>& x, int fault) {
  py::array_t<int> result(64);
  const char* const error = kKernel(x.data(), result.mutable_data(), fault, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
  return result;
}

py::array_t<float> product(const py::array_t<uint16_t, py::array::c_style>& a,
                           const py::array_t<uint16_t, py::array::c_style>& b, int fault) {
  py::array_t<float> result({kProductRows, kProductColumns});
  const char* const error = planted_product(a.data(), b.data(), result.mutable_data(),
                                            static_cast<int>(a.shape(1)), fault, nullptr);
  if (error != nullptr) throw std::runtime_error(error);
  return result;
}

// Whether a kernel, known by its number, had to be allowed so many bytes; None if that failed.
std::optional<bool> was_asked(uintptr_t kernel, int device, size_t bytes, bool fails) {
  bool asked = false;
  const char* const error =
      allow_once(reinterpret_cast<const void*>(kernel), device, bytes, [&] {
        asked = true;
        return fails ? "no" : nullptr;
      });
  if (error != nullptr) return std::nullopt;
  return asked;
}

}  // namespace

PYBIND11_MODULE(mghf_fast_cuda_host, m) {
  m.def(
      "set_gpu",
      [](int64_t shared_bytes, bool clusters, int64_t multiprocessors) {
        mghf::host::gpu = {shared_bytes, clusters, multiprocessors};
      },
      py::arg("shared_bytes"), py::arg("clusters"),
      py::arg("multiprocessors") = mghf::host::Gpu{}.multiprocessors);
  m.def("set_coupling_feature_bytes", [](int64_t bytes) { coupling_feature_bytes = bytes; });
  m.def("set_coupling_layer_bytes", [](int64_t bytes) { coupling_layer_bytes = bytes; });
  m.def("use_older", [](const std::string& op, bool older) {
    return mghf_cuda_use_older(op.c_str(), 0, older) != 0;
  });
  m.def("newest", [](int op) { return newest(static_cast<Variant>(op)); });
  m.def("set_dec_blocks", [](int blocks) { dec_blocks = blocks; });
  m.def("tensor_core_sum", [](float before, const std::vector<double>& products) {
    return host_mma::add_up(before, products.data(), static_cast<int>(products.size()));
  });
  m.def("split_halves", [](const std::vector<float>& x, float largest) {
    const PowerOfTwo scale(largest);
    std::vector<float> big, small;
    for (const float number : x) {
      const SplitHalves halves(number * scale.by, 0.0f);
      big.push_back(to_float(Half{static_cast<uint16_t>(halves.big)}));
      small.push_back(to_float(Half{static_cast<uint16_t>(halves.small)}));
    }
    return py::make_tuple(big, small, scale.by, scale.back);
  });
  m.def("count", [](bool on) { mghf::host::counting = {on}; });
  m.def("counted", [] {
    return py::make_tuple(mghf::host::counting.launches, mghf::host::counting.workspace_bytes);
  });
  // (address of the kernel, parameters, blocks, blocks of a cluster, threads, shared bytes)
  m.def("counted_kernels", [] {
    py::list kernels;
    for (const mghf::host::Counted& each : mghf::host::counting.kernels) {
      kernels.append(py::make_tuple(reinterpret_cast<uintptr_t>(each.kernel),
                                    py::bytes(each.parameters), each.blocks,
                                    each.blocks_of_cluster, each.threads, each.shared_bytes));
    }
    return kernels;
  });
  m.def("allow_once", &was_asked);
  m.def("planted_barrier", &run<planted_barrier>);
  m.def("planted_index", &run<planted_index>);
  m.def("planted_cluster", &run<planted_cluster>);
  m.def("planted_product", &product);
  m.def("planted_copy", &run<planted_copy>);
  m.def("planted_ring", &run<planted_ring>);
  m.def("planted_workspace", &run<planted_workspace>);
  m.def("planted_workspaces", &run<planted_workspaces>);
}
