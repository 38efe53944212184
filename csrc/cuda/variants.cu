// The choice between newer and older kernels; see variants.h.
#include "variants.h"

#include <atomic>
#include <cstring>

#include "device.h"

namespace mghf::cuda {

namespace {

// In Variant's order.
constexpr const char* kOps[] = {"coupling", "monce", "patches", "content_style"};
constexpr int kDevices = 64;
// A bit for each device. Beyond the last all devices share its bit.
std::atomic<uint64_t> older[sizeof kOps / sizeof *kOps];

std::shared_mutex& in_use() {
  static std::shared_mutex mutex;
  return mutex;
}

uint64_t bit_of(int device) {
  return uint64_t{1} << (device < 0 ? 0 : device < kDevices ? device : kDevices - 1);
}

}  // namespace

std::shared_lock<std::shared_mutex> hold_variants() {
  return std::shared_lock<std::shared_mutex>(in_use());
}

bool newest(Variant variant) {
  const uint64_t devices = older[static_cast<int>(variant)].load(std::memory_order_relaxed);
  if (devices == 0) return true;
  int device = 0;
#ifdef __CUDACC__
  if (cudaGetDevice(&device) != cudaSuccess) return false;
#endif
  return (devices & bit_of(device)) == 0;
}

}  // namespace mghf::cuda

extern "C" int mghf_cuda_use_older(const char* op, int device, int older) {
  using namespace mghf::cuda;
  const std::unique_lock<std::shared_mutex> lock(in_use());
  for (int n = 0; const char* name : kOps) {
    if (std::strcmp(op, name) == 0) {
      if (older != 0) {
        mghf::cuda::older[n].fetch_or(bit_of(device));
      } else {
        mghf::cuda::older[n].fetch_and(~bit_of(device));
      }
      return 1;
    }
    ++n;
  }
  return 0;
}
