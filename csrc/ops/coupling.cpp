// The op `coupling`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "coupling(Tensor x, Tensor weights, int channels, int kernel, str activation, float clamp,"
      " str precision=\"float32\") -> Tensor");
  m.def(
      "coupling_inverse(Tensor y, Tensor weights, int channels, str activation, float clamp)"
      " -> Tensor");
  m.def(
      "coupling_backward(Tensor grad, Tensor x, Tensor weights, int channels, int kernel,"
      " str activation, float clamp, bool need_weights,"
      " str precision=\"float32\") -> (Tensor, Tensor)");
  // Only the CUDA kernels have these: with weights packed once for images like x, and with a state,
  // which the forward keeps for the backward. An empty state stands for none.
  m.def("coupling_pack(Tensor x, Tensor weights, int channels, int kernel) -> Tensor");
  m.def(
      "coupling_packed(Tensor x, Tensor weights, Tensor packed, int channels, int kernel,"
      " str activation, float clamp, bool keep, str precision=\"float32\") -> (Tensor, Tensor)");
  m.def(
      "coupling_packed_backward(Tensor grad, Tensor x, Tensor weights, Tensor packed, Tensor state,"
      " int channels, int kernel, str activation, float clamp,"
      " str precision=\"float32\") -> Tensor");
}
