#include "planted.h"

#include "arguments.h"

namespace mghf::cuda {

namespace {

using Planted = const char* (*)(const int* x, int* result, int fault, Stream);

template <Planted kKernel>
py::array_t<int> run(const py::array_t<int>& x, int fault) {
  py::array_t<int> result(64);
  check(kKernel(x.data(), result.mutable_data(), fault, nullptr));
  return result;
}

}  // namespace

void define_planted(py::module_& m) {
  m.def("planted_barrier", &run<planted_barrier>);
  m.def("planted_index", &run<planted_index>);
  m.def("planted_cluster", &run<planted_cluster>);
  m.def("planted_copy", &run<planted_copy>);
}

}  // namespace mghf::cuda
