// The op `channel_mean`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def("channel_mean(Tensor x) -> Tensor");
  m.def("channel_mean_backward(Tensor grad, Tensor x) -> Tensor");
}
