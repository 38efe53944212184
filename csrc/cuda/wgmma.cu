// Whether there are products of warpgroups; see wgmma.h.
#include "wgmma.h"

#include <map>
#include <mutex>

namespace mghf::cuda {

#ifdef __CUDACC__
namespace {

// Only code for 9.0a has the instructions, and the driver does not say whether code for 9.0 is
// that. A kernel's largest block does.
__global__ void __launch_bounds__(kWarpgroupProducts ? kWarpgroup : kWarp) code_for_products() {}

}  // namespace
#endif

const char* has_warpgroup_products(bool& has) {
#ifdef __CUDACC__
  static std::mutex mutex;
  static std::map<int, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0;
  cudaFuncAttributes code{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    if (const auto found = known.find(device); found != known.end()) {
      has = found->second;
      return nullptr;
    }
    error = cudaFuncGetAttributes(&code, code_for_products);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  has = known[device] = code.maxThreadsPerBlock == kWarpgroup;
#else
  has = host::gpu.clusters;  // both came with 9.0
#endif
  return nullptr;
}

}  // namespace mghf::cuda
