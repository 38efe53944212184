// The op `channel_mean` on the CPU: argument checks and the calls of its kernels.

#include "../channel_mean.h"
#include "arguments.h"

namespace {

using mghf::ImageView;
using mghf::MutableImageView;
using mghf::Tensor;

Tensor channel_mean(const Tensor& features) {
  const ImageView x = mghf::read_view(features, "x");
  const auto& kernels = MGHF_KERNELS_OF(channel_mean);
  const int64_t shape[] = {x.batch, x.channels};
  Tensor result = mghf::new_tensor(features, shape, mghf::ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  const auto pixels = static_cast<double>(x.height * x.width);
  mghf::for_each(x.batch * x.channels, kernels.workspace_bytes(), [&](int64_t i, void* workspace) {
    const double sum = kernels.map_sum(x, i / x.channels, i % x.channels, workspace);
    out[i] = static_cast<float>(sum / pixels);
  });
  return result;
}

Tensor channel_mean_backward(const Tensor& grad, const Tensor& features) {
  const ImageView x = mghf::read_view(features, "x");
  mghf::check_float32(grad, "grad", 2);
  STD_TORCH_CHECK(grad.size(0) == x.batch && grad.size(1) == x.channels, "grad has shape ",
                  mghf::shape_of(grad), "; allowed is (B, C) for x's ", mghf::shape_of(features));
  const auto& kernels = MGHF_KERNELS_OF(channel_mean);
  Tensor result = mghf::new_image_like(features, x.channels);
  if (features.numel() == 0) return result;
  const MutableImageView out = mghf::write_view(result, "grad_x");
  const float* g = grad.const_data_ptr<float>();
  const auto pixels = static_cast<double>(x.height * x.width);
  mghf::for_each(x.batch * x.channels, kernels.workspace_bytes(), [&](int64_t i, void* workspace) {
    const int64_t b = i / x.channels, c = i % x.channels;
    const double value = g[b * grad.stride(0) + c * grad.stride(1)] / pixels;
    kernels.fill_map(out, b, c, static_cast<float>(value), workspace);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("channel_mean", TORCH_BOX(&channel_mean));
  m.impl("channel_mean_backward", TORCH_BOX(&channel_mean_backward));
}
