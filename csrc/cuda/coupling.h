// The invertible block and the gradient of its input on a GPU; for the mathematics see
// mghf_fast/reference/coupling.py.
#pragma once

#include "../common/coupling.h"
#include "../common/precision.h"
#include "image.h"

namespace mghf::cuda {

constexpr int64_t kMostCouplingChannels = 256;

// The ops' memory: packed weights, the workspace and what the forward keeps; each is aligned to 16
// bytes. The workspace holds features of as many images at a time as fit into 160 MiB or, where
// that does not raise a step's peak of memory, into a stack of the block's result; or else of as
// many rows of one image, with a halo, at least 8. Only tests set another limit; 0 is this one.
extern int64_t coupling_feature_bytes;

// The weights are float32, in the order of common/coupling.h. The ops take them in this form, and
// packed for images of type T; both depend on inputs, channels and kernel only. This and the
// functions below return an error text, or null.
template <class T>
int64_t coupling_packed_bytes(const CouplingShape& shape);
template <class T>
const char* coupling_pack(const CouplingShape& shape, const float* weights, void* packed,
                          Stream stream);

struct CouplingBlock {
  CouplingShape shape;
  const float* weights;
  void* packed;  // is only read
  Precision precision = Precision::float32;  // of products with float32 images
};

// Memory with what the forward keeps for the gradient, (B, H, W, bytes of a pixel), or none. Tests
// count launches without memory, so that the pointer does not tell.
template <class Byte>
struct CouplingState {
  bool exists;
  Byte* data;
};

// Bytes of a pixel; 0 for softplus, of which the forward keeps nothing.
template <class T>
int64_t coupling_state_bytes(const CouplingShape& shape);

// Writes the value at x (B, inputs, H, W) to y (B, C, H, W), and the state.
template <class T>
int64_t coupling_workspace_bytes(const CouplingShape& shape, const Image<T>& x);
template <class T>
const char* coupling(const CouplingBlock& block, const Image<T>& x, const MutableImage<T>& y,
                     const CouplingState<unsigned char>& state, void* workspace, Stream stream);

// Writes the gradient of x for that of y. Without a state it recomputes what it needs from x.
template <class T>
int64_t coupling_backward_workspace_bytes(const CouplingShape& shape, const Image<T>& x,
                                          bool with_state);
template <class T>
const char* coupling_backward(const CouplingBlock& block, const Image<T>& grad, const Image<T>& x,
                              const CouplingState<const unsigned char>& state,
                              const MutableImage<T>& grad_x, void* workspace, Stream stream);

// Writes the x (B, C, H, W) whose value is y, for a 1x1 mix of C inputs. The weights, which it
// packs into the workspace, begin with N, the inverse of the mix, and -N bias instead of mix and
// bias.
template <class T>
int64_t coupling_inverse_workspace_bytes(const CouplingShape& shape, const Image<T>& y);
template <class T>
const char* coupling_inverse(const CouplingShape& shape, const Image<T>& y, const float* weights,
                             const MutableImage<T>& x, void* workspace, Stream stream);

}  // namespace mghf::cuda
