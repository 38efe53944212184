// The op `patches`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  // The embedding and the state that the gradients need: int32 (N, 1 + ceil(hidden / 32), B C).
  m.def(
      "patches(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
      " int patch_size, int stride, str precision=\"float32\") -> (Tensor, Tensor)");
  // The gradient of x, of which only shape, type and layout are used.
  m.def(
      "patches_backward(Tensor grad, Tensor embedding, Tensor state, Tensor x, Tensor weight1,"
      " Tensor weight2, int patch_size, int stride, str precision=\"float32\") -> Tensor");
  // The same, added to grad_x.
  m.def(
      "patches_backward_add_(Tensor(a!) grad_x, Tensor grad, Tensor embedding, Tensor state,"
      " Tensor weight1, Tensor weight2, int patch_size, int stride,"
      " str precision=\"float32\") -> ()");
  // The weights in a form that a GPU's kernels take, uint8; the same results with it. (CUDA only.)
  m.def("patches_pack(Tensor weight1, Tensor weight2, int patch_size, int stride) -> Tensor");
  m.def(
      "patches_packed(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2,"
      " Tensor packed, int patch_size, int stride,"
      " str precision=\"float32\") -> (Tensor, Tensor)");
  m.def(
      "patches_packed_backward_add_(Tensor(a!) grad_x, Tensor grad, Tensor embedding, Tensor state,"
      " Tensor weight1, Tensor weight2, Tensor packed, int patch_size, int stride,"
      " str precision=\"float32\") -> ()");
  m.def(
      "patches_backward_weights(Tensor grad, Tensor embedding, Tensor state, Tensor x,"
      " Tensor weight1, Tensor bias1, Tensor weight2, int patch_size, int stride,"
      " str precision=\"float32\") -> (Tensor, Tensor, Tensor, Tensor)");
}
