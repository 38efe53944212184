// What the current device has; see device.h.
#include "device.h"

namespace mghf::cuda {

#ifdef __CUDACC__
namespace {

// Which of its architectures a library runs as, its kernels tell.
__global__ void nothing() {}

}  // namespace
#endif

const char* current_gpu(Gpu& gpu) {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  cudaFuncAttributes code{};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, nothing);
  gpu = {bytes, code.ptxVersion >= 90};
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  gpu = {host::gpu.shared_bytes, host::gpu.clusters};
  return nullptr;
#endif
}

}  // namespace mghf::cuda
