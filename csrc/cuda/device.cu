// Properties of the current device, and the shared memory allowed to kernels on each; see device.h.
#include "device.h"

#include <map>
#include <mutex>
#include <utility>

namespace mghf::cuda {

#ifdef __CUDACC__
namespace {

// Its attributes give the architecture of the code that the library runs, which only a kernel
// knows.
__global__ void nothing() {}

}  // namespace
#endif

const char* allow_once(const void* kernel, int device, size_t bytes,
                       const std::function<const char*()>& allow) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& before = allowed[{kernel, device}];
  if (bytes <= before) return nullptr;
  const char* const error = allow();
  if (error == nullptr) before = bytes;
  return error;
}

#ifdef __CUDACC__
const char* allow_shared(const void* kernel, size_t bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return allow_once(kernel, device, bytes, [=] {
    const cudaError_t found = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    return found == cudaSuccess ? nullptr : cudaGetErrorString(found);
  });
}
#endif

const char* current_gpu(Gpu& gpu) {
#ifdef __CUDACC__
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int device = 0, bytes = 0;
  cudaFuncAttributes code{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    if (const auto found = known.find(device); found != known.end()) {
      gpu = found->second;
      return nullptr;
    }
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, nothing);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  gpu = known[device] = {bytes, code.ptxVersion >= 90};
#else
  gpu = {host::gpu.shared_bytes, host::gpu.clusters};
#endif
  return nullptr;
}

}  // namespace mghf::cuda
