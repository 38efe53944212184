// The op `content_style` on CUDA: argument checks and the calls of its kernels.
#include "../content_style.h"

#include <initializer_list>
#include <tuple>

#include "arguments.h"

namespace {

using namespace mghf;
using namespace mghf::cuda;

// Kernels count pixels and channels, rounded up to their tiles, in 32 bits.
constexpr int64_t kMostSize = (int64_t{1} << 31) - 256;

void check_pair(const Tensor& gt, const Tensor& sr) {
  check_image(gt, "gt");
  check_image(sr, "sr");
  check_same_shape(gt, "gt", sr, "sr");
  STD_TORCH_CHECK(gt.scalar_type() == sr.scalar_type(), "gt and sr are not of one type");
  check_same_device(gt, "gt", sr, "sr");
  const int64_t pixels = sr.size(2) * sr.size(3);
  STD_TORCH_CHECK(sr.size(1) > 0 && sr.size(1) < kMostSize && pixels > 0 &&
                      pixels < kMostSize,
                  "sr has shape ", shape_of(sr), "; allowed are 1 to ", kMostSize - 1,
                  " pixels and channels");
}

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result content_style_op(const Tensor& gt, const Tensor& sr, int64_t top_m, double alpha,
                        double gamma, int64_t bins, const std::string& precision) {
  const Precision grade = check_precision(precision);
  check_pair(gt, sr);
  const int64_t batch = sr.size(0), channels = sr.size(1);
  check_top_m(top_m, channels);
  check_bins(bins);
  const Launcher launcher(sr);
  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(sr, {shape.begin(), shape.size()}, ScalarType::Float);
  };
  Tensor naive = floats({batch}), mse = floats({batch}), correlation = floats({batch});
  Tensor gram = floats({batch}), weights = floats({batch, top_m});
  Tensor moments = floats({batch, kStyleMoments, top_m});
  Tensor difference = floats({batch, top_m, top_m});
  Tensor kept = torch::stable::new_empty(sr, {batch, top_m}, ScalarType::Long);
  const auto data = [](const Tensor& t) { return t.mutable_data_ptr<float>(); };
  const StyleOptions options{top_m, alpha, gamma, bins, grade};
  const StyleResults results{data(naive),
                             data(mse),
                             data(correlation),
                             data(gram),
                             kept.mutable_data_ptr<int64_t>(),
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

void content_style_backward_into_op(Tensor grad_sr, const Tensor& grad_naive,
                                    const Tensor& grad_mse, const Tensor& grad_correlation,
                                    const Tensor& grad_gram, const Tensor& gt, const Tensor& sr,
                                    const Tensor& kept, const Tensor& weights,
                                    const Tensor& moments, const Tensor& difference,
                                    const std::string& precision) {
  const Precision grade = check_precision(precision);
  check_pair(gt, sr);
  check_image(grad_sr, "grad_sr");
  check_same_shape(grad_sr, "grad_sr", sr, "sr");
  check_same_device(grad_sr, "grad_sr", sr, "sr");
  STD_TORCH_CHECK(grad_sr.scalar_type() == sr.scalar_type(), "grad_sr and sr are not of one type");
  const int64_t batch = sr.size(0);
  StyleGradients grads{};
  int i = 0;
  for (const Tensor* grad : {&grad_naive, &grad_mse, &grad_correlation, &grad_gram}) {
    check_float32(*grad, "grad", 1);
    check_shape(*grad, "grad", {batch});
    grads.data[i] = grad->const_data_ptr<float>();
    grads.strides[i++] = grad->stride(0);
  }
  check_cuda(kept, "kept");
  STD_TORCH_CHECK(kept.scalar_type() == ScalarType::Long, "kept is not int64");
  STD_TORCH_CHECK(kept.dim() == 2 && kept.size(1) <= sr.size(1), "kept has shape ", shape_of(kept),
                  "; allowed is (B, M), M at most the channels of sr's ", shape_of(sr));
  const int64_t top_m = kept.size(1);
  check_shape(kept, "kept", {batch, top_m});
  check_float32(weights, "weights", 2);
  check_shape(weights, "weights", {batch, top_m});
  check_float32(moments, "moments", 3);
  check_shape(moments, "moments", {batch, kStyleMoments, top_m});
  check_float32(difference, "difference", 3);
  check_shape(difference, "difference", {batch, top_m, top_m});
  const Launcher launcher(sr);
  const Tensor dense[] = {
      torch::stable::contiguous(kept), torch::stable::contiguous(weights),
      torch::stable::contiguous(moments), torch::stable::contiguous(difference)};
  const auto data = [](const Tensor& t) { return t.const_data_ptr<float>(); };
  const StyleStatistics statistics{top_m, dense[0].const_data_ptr<int64_t>(),
                                   data(dense[1]), data(dense[2]), data(dense[3]), grade};
  with_image(sr, "sr", [&]<class T>(const Image<T>& image) {
    const Tensor workspace =
        new_workspace(sr, content_style_backward_workspace_bytes(image, top_m));
    check_launch(content_style_backward(grads, image_of<T>(gt), image, statistics,
                                        mutable_image_of<T>(grad_sr),
                                        workspace.mutable_data_ptr(), launcher.stream()),
                 "content_style_backward");
  });
}

Tensor content_style_backward_op(const Tensor& grad_naive, const Tensor& grad_mse,
                                 const Tensor& grad_correlation, const Tensor& grad_gram,
                                 const Tensor& gt, const Tensor& sr, const Tensor& kept,
                                 const Tensor& weights, const Tensor& moments,
                                 const Tensor& difference, const std::string& precision) {
  check_image(sr, "sr");
  Tensor grad_sr = new_image_like(sr, sr.size(1));
  content_style_backward_into_op(grad_sr, grad_naive, grad_mse, grad_correlation, grad_gram, gt,
                                 sr, kept, weights, moments, difference, precision);
  return grad_sr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, MGHF_DISPATCH_KEY, m) {
  m.impl("content_style", TORCH_BOX(&content_style_op));
  m.impl("content_style_backward", TORCH_BOX(&content_style_backward_op));
  m.impl("content_style_backward_into_", TORCH_BOX(&content_style_backward_into_op));
}
