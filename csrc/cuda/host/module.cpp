// The CUDA kernels on the host, for Python: each op in a file of its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "../mma.h"

namespace mghf::cuda {

void define_content_style(pybind11::module_& m);
void define_coupling(pybind11::module_& m);
void define_entropy(pybind11::module_& m);
void define_gram(pybind11::module_& m);
void define_monce(pybind11::module_& m);
void define_sinkhorn(pybind11::module_& m);
void define_patches(pybind11::module_& m);
void define_planted(pybind11::module_& m);

}  // namespace mghf::cuda

PYBIND11_MODULE(mghf_fast_cuda_host, m) {
  m.def("set_gpu", [](int64_t shared_bytes, bool clusters) {
    mghf::host::gpu = {shared_bytes, clusters};
  });
  m.def("tensor_core_sum", [](float before, const std::vector<double>& products) {
    return mghf::cuda::host_mma::add_up(before, products.data(), static_cast<int>(products.size()));
  });
  m.def("count", [](bool on) { mghf::host::counting = {on}; });
  m.def("counted", [] {
    return pybind11::make_tuple(mghf::host::counting.launches,
                                mghf::host::counting.workspace_bytes);
  });
  // Whether a kernel, known by its number, had to be allowed so many bytes; null if that failed.
  m.def("allow_once", [](uintptr_t kernel, int device, size_t bytes, bool fails) -> pybind11::object {
    bool asked = false;
    const char* const error =
        mghf::cuda::allow_once(reinterpret_cast<const void*>(kernel), device, bytes, [&] {
          asked = true;
          return fails ? "no" : nullptr;
        });
    if (error != nullptr) return pybind11::none();
    return pybind11::bool_(asked);
  });
  mghf::cuda::define_content_style(m);
  mghf::cuda::define_coupling(m);
  mghf::cuda::define_entropy(m);
  mghf::cuda::define_gram(m);
  mghf::cuda::define_monce(m);
  mghf::cuda::define_sinkhorn(m);
  mghf::cuda::define_patches(m);
  mghf::cuda::define_planted(m);
}
