// The CUDA kernels on the host, for Python: each op in a file of its own.
#include <pybind11/pybind11.h>

#include "emulator.h"

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
  mghf::cuda::define_content_style(m);
  mghf::cuda::define_coupling(m);
  mghf::cuda::define_entropy(m);
  mghf::cuda::define_gram(m);
  mghf::cuda::define_monce(m);
  mghf::cuda::define_sinkhorn(m);
  mghf::cuda::define_patches(m);
  mghf::cuda::define_planted(m);
}
