// The op `coupling`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "coupling(Tensor x, Tensor weights, int channels, int kernel, str activation, float clamp)"
      " -> Tensor");
  m.def(
      "coupling_inverse(Tensor y, Tensor weights, int channels, str activation, float clamp)"
      " -> Tensor");
  m.def(
      "coupling_backward(Tensor grad, Tensor x, Tensor weights, int channels, int kernel,"
      " str activation, float clamp, bool need_weights) -> (Tensor, Tensor)");
}
