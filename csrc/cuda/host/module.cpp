// The CUDA kernels on the host, for Python: each op in a file of its own.
#include <pybind11/pybind11.h>

#include "emulator.h"

namespace mghf::cuda {

void define_planted(pybind11::module_& m);
void define_entropy(pybind11::module_& m);

}  // namespace mghf::cuda

PYBIND11_MODULE(mghf_fast_cuda_host, m) {
  m.def("set_gpu", [](int64_t shared_bytes, bool clusters) {
    mghf::host::gpu = {shared_bytes, clusters};
  });
  mghf::cuda::define_planted(m);
  mghf::cuda::define_entropy(m);
}
