// The op `content_style`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "content_style(Tensor gt, Tensor sr, int top_m, float alpha, float gamma, int bins,"
      " str precision=\"float32\")"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "content_style_backward(Tensor grad_naive, Tensor grad_mse, Tensor grad_correlation,"
      " Tensor grad_gram, Tensor gt, Tensor sr, Tensor kept, Tensor weights, Tensor moments,"
      " Tensor difference, str precision=\"float32\") -> Tensor");
  // The same, written into grad_sr, which may be gt.
  m.def(
      "content_style_backward_into_(Tensor(a!) grad_sr, Tensor grad_naive, Tensor grad_mse,"
      " Tensor grad_correlation, Tensor grad_gram, Tensor gt, Tensor sr, Tensor kept,"
      " Tensor weights, Tensor moments, Tensor difference,"
      " str precision=\"float32\") -> ()");
}
