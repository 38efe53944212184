// The op `monce`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "monce(Tensor query, Tensor key, float temperature, float epsilon, int iterations,"
      " float negative_weight, str cost, str plan_gradient, int kept,"
      " str precision=\"float32\") -> (Tensor, Tensor)");
  m.def(
      "monce_backward(Tensor grad, Tensor query, Tensor key, Tensor state, float temperature,"
      " float epsilon, int iterations, float negative_weight, str cost, str plan_gradient,"
      " str precision=\"float32\") -> Tensor");
}
