// The native library's own op. Every other op registers itself in the file that has its name:
// schema, argument checks and the call of its kernels. The library knows nothing of Python or autograd;
// mghf_fast/ops/ gives these raw ops their gradients and contracts.

#include <string>

#include <torch/csrc/stable/library.h>

#include "../cpu/dispatch.h"

namespace {

std::string cpu_capability() { return mghf::name(mghf::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY(mghf_native, m) { m.def("cpu_capability() -> str"); }

// An op without tensors has no device to be dispatched on.
STABLE_TORCH_LIBRARY_IMPL(mghf_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
