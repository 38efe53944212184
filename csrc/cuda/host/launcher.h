// ../ops/launcher.h for the host: the ops take CPU tensors, which the emulator works on, and
// tensors of "meta", whose launches are only counted.
#pragma once

#include <cstring>

#include "../../common/checks.h"
#include "../variants.h"
#include "emulator.h"

#define MGHF_DISPATCH_KEY CompositeExplicitAutograd

namespace mghf::cuda {

inline void check_cuda(const Tensor&, const char*) {}

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}
  void* stream() const { return nullptr; }

 private:
  std::shared_lock<std::shared_mutex> variants_ = hold_variants();
};

// Filled with NaN, so that uninitialised reads show.
inline Tensor new_workspace(const Tensor& like, int64_t bytes) {
  const Tensor workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  if (host::counting.on) {
    host::counting.workspace_bytes += bytes;
  } else if (bytes > 0) {
    std::memset(workspace.mutable_data_ptr(), 0xff, static_cast<size_t>(bytes));
  }
  return workspace;
}

}  // namespace mghf::cuda
