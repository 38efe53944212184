// The CUDA implementation of the native op `content_style`: argument checks, results, the calls of
// its kernels.
#include "../content_style.h"

#include <initializer_list>
#include <tuple>

#include "arguments.h"

namespace {

using namespace mghf::cuda;
using mghf::shape_of;

// Kernels count pixels and channels, rounded up to their tiles, in 32 bits.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 256;

void check_pair(const Tensor& gt, const Tensor& sr) {
  check_image(gt, "gt");
  check_image(sr, "sr");
  bool same = true;
  for (int64_t d = 0; d < 4; ++d) same = same && gt.size(d) == sr.size(d);
  STD_TORCH_CHECK(same, "gt has shape ", shape_of(gt), "; allowed is sr's, ", shape_of(sr));
  STD_TORCH_CHECK(gt.scalar_type() == sr.scalar_type(), "gt and sr are not of one type");
  STD_TORCH_CHECK(gt.get_device_index() == sr.get_device_index(),
                  "gt and sr are not on one device");
  const int64_t pixels = sr.size(2) * sr.size(3);
  STD_TORCH_CHECK(sr.size(1) > 0 && sr.size(1) < kMostSize && pixels > 0 &&
                      pixels < kMostSize,
                  "sr has shape ", shape_of(sr), "; allowed are 1 to ", kMostSize - 1,
                  " pixels and channels");
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result content_style_op(const Tensor& gt, const Tensor& sr, int64_t top_m, double alpha,
                        double gamma, int64_t bins) {
  check_pair(gt, sr);
  const int64_t batch = sr.size(0), channels = sr.size(1);
  STD_TORCH_CHECK(top_m >= 0 && top_m <= channels, "top_m is ", top_m, "; allowed is 0 to ",
                  channels);
  STD_TORCH_CHECK(bins >= 2 && bins < int64_t{1} << 24, "bins is ", bins,
                  "; allowed are 2 to 16777215");
  const Launcher launcher(sr);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(sr, {shape.begin(), shape.size()}, ScalarType::Float);
  };
  Tensor naive = floats({batch}), mse = floats({batch}), correlation = floats({batch});
  Tensor gram = floats({batch}), weights = floats({batch, top_m});
  Tensor moments = floats({batch, kStyleMoments, top_m});
  Tensor difference = floats({batch, top_m, top_m});
  Tensor kept = torch::stable::new_empty(sr, {batch, top_m}, ScalarType::Long);
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
  const StyleOptions options{top_m, alpha, gamma, bins};
  const StyleResults results{data(naive),
                             data(mse),
                             data(correlation),
                             data(gram),
                             static_cast<int64_t*>(kept.mutable_data_ptr()),
                             data(weights),
                             data(moments),
                             data(difference)};
  with_image(sr, "sr", [&]<class T>(const Image<T>& image) {
    const Tensor workspace = new_workspace(sr, content_style_workspace_bytes(image, options));
    check_launch(content_style(image_of<T>(gt), image, options, results,
                               workspace.mutable_data_ptr(), launcher.stream()),
                 "content_style");
  });
  return {naive, mse, correlation, gram, kept, weights, moments, difference};
}

Tensor content_style_backward_op(const Tensor& grad_naive, const Tensor& grad_mse,
                                 const Tensor& grad_correlation, const Tensor& grad_gram,
                                 const Tensor& gt, const Tensor& sr, const Tensor& kept,
                                 const Tensor& weights, const Tensor& moments,
                                 const Tensor& difference) {
  check_pair(gt, sr);
  const int64_t batch = sr.size(0);
  StyleGradients grads{};
  int i = 0;
  for (const Tensor* grad : {&grad_naive, &grad_mse, &grad_correlation, &grad_gram}) {
    check_shape(*grad, "grad", ScalarType::Float, {batch});
    grads.data[i] = static_cast<const float*>(grad->const_data_ptr());
    grads.strides[i++] = grad->stride(0);
  }
  STD_TORCH_CHECK(kept.dim() == 2 && kept.size(1) <= sr.size(1), "kept has shape ", shape_of(kept),
                  "; allowed is (B, M), M at most the channels of sr's ", shape_of(sr));
  const int64_t top_m = kept.size(1);
  check_shape(kept, "kept", ScalarType::Long, {batch, top_m});
  check_shape(weights, "weights", ScalarType::Float, {batch, top_m});
  check_shape(moments, "moments", ScalarType::Float, {batch, kStyleMoments, top_m});
  check_shape(difference, "difference", ScalarType::Float, {batch, top_m, top_m});
  const Launcher launcher(sr);
  const Tensor of[] = {torch::stable::contiguous(kept), torch::stable::contiguous(weights),
                       torch::stable::contiguous(moments), torch::stable::contiguous(difference)};
  const auto data = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const StyleStatistics statistics{top_m, static_cast<const int64_t*>(of[0].const_data_ptr()),
                                   data(of[1]), data(of[2]), data(of[3])};
  Tensor grad_sr = new_image_like(sr, sr.size(1));
  with_image(sr, "sr", [&]<class T>(const Image<T>& image) {
    const Tensor workspace =
        new_workspace(sr, content_style_backward_workspace_bytes(image, top_m));
    check_launch(content_style_backward(grads, image_of<T>(gt), image, statistics,
                                        mutable_image_of<T>(grad_sr),
                                        workspace.mutable_data_ptr(), launcher.stream()),
                 "content_style_backward");
  });
  return grad_sr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mghf_native, CUDA, m) {
  m.impl("content_style", TORCH_BOX(&content_style_op));
  m.impl("content_style_backward", TORCH_BOX(&content_style_backward_op));
}
