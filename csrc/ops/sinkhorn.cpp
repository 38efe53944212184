// The op `sinkhorn`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "sinkhorn(Tensor similarity, str cost, float epsilon, int iterations, float? tolerance)"
      " -> Tensor");
  m.def(
      "sinkhorn_backward(Tensor grad, Tensor similarity, str cost, float epsilon, int iterations,"
      " float? tolerance) -> Tensor");
}
