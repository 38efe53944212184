// The CPU library's own op: which instruction set its kernels use.

#include <string>

#include "../../common/library.h"
#include "../dispatch.h"

namespace {

std::string cpu_capability() { return mghf::name(mghf::cpu_capability()); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) { m.def("cpu_capability() -> str"); }

// An op without tensors has no device to be dispatched on.
STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}
