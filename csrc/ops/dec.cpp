// The op `dec`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) {
  m.def(
      "dec(Tensor sr, Tensor gt, float threshold_db, float positive_temperature,"
      " float negative_temperature, str temperature, str similarity, float max_value,"
      " float norm_floor) -> (Tensor, Tensor)");
  m.def(
      "dec_backward(Tensor grad, Tensor sr, Tensor gt, Tensor statistics, float threshold_db,"
      " float positive_temperature, float negative_temperature, str temperature, str similarity,"
      " float max_value, float norm_floor) -> Tensor");
}
