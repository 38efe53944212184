// The op `gram` on the CPU: argument checks and the calls of its kernels.

#include "../gram.h"
#include "arguments.h"
#include "pixel_runs.h"

namespace {

using mghf::ImageView;
using mghf::PixelRuns;
using mghf::Tensor;

constexpr int64_t kRunPixels = 8192;
constexpr int64_t kMostSums = 1 << 20;  // float64 elements of all runs' matrices, 8 MiB

Tensor gram(const Tensor& features, double scale, const std::string& precision) {
  mghf::check_precision(precision);
  const ImageView x = mghf::read_view(features, "x");
  const auto& kernels = MGHF_KERNELS_OF(gram);
  const int64_t channels = x.channels, width = kernels.padded(channels), size = channels * width;
  const int64_t shape[] = {x.batch, channels, channels};
  Tensor result = mghf::new_tensor(features, shape, mghf::ScalarType::Float);
  float* out = result.mutable_data_ptr<float>();
  if (features.numel() == 0) {
    std::fill_n(out, result.numel(), 0.0f);
    return result;
  }
  const PixelRuns runs(x, kRunPixels, std::clamp<int64_t>(kMostSums / size, 2, 64));
  const mghf::Buffer<double> sums(x.batch * runs.count * size);
  mghf::for_each(x.batch * runs.count, kernels.workspace_bytes(x), [&](int64_t i, void* workspace) {
    const int64_t run = i % runs.count;
    kernels.run_sums(x, i / runs.count, runs.begin(run), runs.size(run), sums.get() + i * size,
                     workspace);
  });
  for (int64_t b = 0; b < x.batch; ++b) {
    double* total = sums.get() + b * runs.count * size;
    for (int64_t run = 1; run < runs.count; ++run) {
      for (int64_t i = 0; i < size; ++i) total[i] += total[run * size + i];
    }
    float* matrix = out + b * channels * channels;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = i; j < channels; ++j) {
        const auto value = static_cast<float>(scale * total[i * width + j]);
        matrix[i * channels + j] = matrix[j * channels + i] = value;
      }
    }
  }
  return result;
}

Tensor gram_backward(const Tensor& grad, const Tensor& features, double scale,
                     const std::string& precision) {
  mghf::check_precision(precision);
  const ImageView x = mghf::read_view(features, "x");
  const int64_t channels = x.channels;
  mghf::check_float32(grad, "grad", 3);
  STD_TORCH_CHECK(
      grad.size(0) == x.batch && grad.size(1) == channels && grad.size(2) == channels,
      "grad has shape ", mghf::shape_of(grad), "; allowed is (B, C, C) for x's ",
      mghf::shape_of(features));
  const auto& kernels = MGHF_KERNELS_OF(gram);
  Tensor result = mghf::new_image_like(features, channels);
  if (features.numel() == 0) return result;
  const mghf::MutableImageView out = mghf::write_view(result, "grad_x");

  const int64_t width = kernels.padded(channels), size = channels * width;
  const mghf::Buffer<float> matrices(x.batch * size);
  std::fill_n(matrices.get(), x.batch * size, 0.0f);
  const float* g = grad.const_data_ptr<float>();
  for (int64_t b = 0; b < x.batch; ++b) {
    const auto entry = [&](int64_t i, int64_t j) {
      return static_cast<double>(g[b * grad.stride(0) + i * grad.stride(1) + j * grad.stride(2)]);
    };
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        matrices.get()[b * size + i * width + j] =
            static_cast<float>(scale * (entry(i, j) + entry(j, i)));
      }
    }
  }
  const PixelRuns runs(x, kRunPixels, int64_t{1} << 40);
  mghf::for_each(x.batch * runs.count, kernels.workspace_bytes(x), [&](int64_t i, void* workspace) {
    const int64_t b = i / runs.count, run = i % runs.count;
    kernels.run_gradient(x, out, b, runs.begin(run), runs.size(run), matrices.get() + b * size,
                         workspace);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram_backward", TORCH_BOX(&gram_backward));
}
