// The op `gram`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def("gram(Tensor x, float scale, str precision=\"float32\") -> Tensor");
  m.def(
      "gram_backward(Tensor grad, Tensor x, float scale, str precision=\"float32\") -> Tensor");
}
