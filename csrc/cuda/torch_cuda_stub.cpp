// A substitute for libtorch_cuda.so, to link the kernels with a torch that has none. It is never
// loaded: torch has loaded its own library before the kernels.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(
    int32_t, void**) {
  return 1;
}
