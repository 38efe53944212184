// The op `entropy`: its schemas.
#include "../common/library.h"

STABLE_TORCH_LIBRARY_FRAGMENT(MGHF_LIBRARY, m) { m.def("entropy(Tensor x, int bins) -> Tensor"); }
