#include "../entropy.h"

#include "arguments.h"

namespace mghf::cuda {

namespace {

py::array_t<float> entropy_of(const py::array& x, int64_t bins) {
  py::array_t<float> result({x.shape(0), x.shape(1)});
  with_image(x, [&](const auto& image) {
    Workspace workspace(
        entropy_workspace_bytes(image.batch, image.channels, image.pixels(), bins));
    check(entropy(image, bins, result.mutable_data(), workspace.get(), nullptr));
  });
  return result;
}

}  // namespace

void define_entropy(py::module_& m) { m.def("entropy", &entropy_of); }

}  // namespace mghf::cuda
