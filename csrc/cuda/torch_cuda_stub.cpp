// Stands for torch's own libtorch_cuda.so where the kernels are linked beside a torch that has none.
// It is never loaded: by the time the kernels are, torch has loaded its own.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(
    int32_t, void**) {
  return 1;
}
