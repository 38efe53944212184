// Properties of the current device, and the shared memory allowed to kernels on each; see device.h.
#include "device.h"

#include <map>
#include <mutex>
#include <tuple>
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

#ifdef __CUDACC__
namespace {

cudaError_t count_running(const void* kernel, int device, const Grid& grid, int64_t& clusters) {
  int number = 0;
  if (grid.blocks_of_cluster == 1) {
    int multiprocessors = 0;
    cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&number, kernel,
                                                                      grid.threads,
                                                                      grid.shared_bytes);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    clusters = int64_t{number} * multiprocessors;
    return error;
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {grid.blocks_of_cluster, 1, 1};
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = {grid.blocks_of_cluster, 1, 1};
  configuration.blockDim = {static_cast<unsigned>(grid.threads), 1, 1};
  configuration.dynamicSmemBytes = grid.shared_bytes;
  configuration.attrs = &cluster;
  configuration.numAttrs = 1;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&number, kernel, &configuration);
  clusters = number;
  if (error != cudaErrorInvalidClusterSize) return error;
  cudaGetLastError();  // is no error of a later call
  clusters = 0;
  return cudaSuccess;
}

}  // namespace
#endif

const char* running_at_a_time(const void* kernel, const Grid& grid, int64_t& clusters) {
#ifdef __CUDACC__
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, size_t, unsigned>, int64_t> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (grid.shared_bytes > kSharedBytesOfAll) {
    const char* const refused = allow_shared(kernel, grid.shared_bytes);
    if (refused != nullptr) return refused;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key =
      std::make_tuple(kernel, device, grid.threads, grid.shared_bytes, grid.blocks_of_cluster);
  if (const auto found = known.find(key); found != known.end()) {
    clusters = found->second;
    return nullptr;
  }
  error = count_running(kernel, device, grid, clusters);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  known[key] = clusters;
#else
  (void)kernel;
  clusters = host::gpu.multiprocessors / grid.blocks_of_cluster;
  if (grid.blocks_of_cluster == 1 && grid.registers > 0) {
    constexpr int64_t kRegisters = 64 << 10, kSharedBytes = 228 << 10, kReserved = 1 << 10;
    const int64_t of_registers = kRegisters / (int64_t{grid.threads} * grid.registers);
    const int64_t of_memory =
        kSharedBytes / (static_cast<int64_t>(grid.shared_bytes) + kReserved);
    const int64_t each = of_registers < of_memory ? of_registers : of_memory;
    clusters *= each > 1 ? each : 1;
  }
#endif
  return nullptr;
}

}  // namespace mghf::cuda
