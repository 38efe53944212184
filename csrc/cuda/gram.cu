// Gram matrices of feature maps, F being the (C, H W) matrix of an image's maps.
//
//     G = scale F F^T                          dF = scale (dG + dG^T) F
//
// The forward has three kernels: products of runs of pixels (maps_product.h), of which one half is
// computed, their sums, and the mirror image. The backward has two: the fragments of dG + dG^T, and
// their product with the pixels (maps_gradient.h). Half-precision values are exact in TF32, which
// saves two of the three products of the forward and one of the backward's.
//
// Predicted floor for B = 1, C = 128, 512 x 512: the forward reads 134 MB (bfloat16 67), 31 us at
// 4.3 TB/s (16 us); the three of four blocks of 64 x 64 take 3.2 G multiply-adds, as three TF32 9.7
// G: 65 us at 300 TFLOP/s (one 21 us), which bounds it. The backward reads and writes 134 MB each,
// 62 us (31 us); 4.3 G multiply-adds, as three TF32 12.9 G: 86 us (two 57 us), which bounds it. In
// float32 without tensor cores, at 60 TFLOP/s, either takes 143 us.
#include "gram.h"

#include "maps_gradient.h"

namespace mghf::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    mirror(const double* totals, float* result, double scale, int64_t batch, int64_t channels) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = element / channels / channels;
  if (b >= batch) return;
  const int i = static_cast<int>(element / channels % channels);
  const int j = static_cast<int>(element % channels);
  const int64_t at = place_of_total(channels, false, i < j ? i : j, i < j ? j : i);
  result[element] = static_cast<float>(scale * totals[product_totals(b, channels, false) + at]);
}

__global__ void __launch_bounds__(kGradientThreads)
    fragments_of_gram(const float* grad, double scale, uint4* fragments, int64_t channels) {
  const int64_t groups = groups_of(channels);
  const int64_t tile = blockIdx.x % kRowTiles, group = blockIdx.x / kRowTiles % groups;
  const int64_t b = blockIdx.x / kRowTiles / groups;
  const int64_t first = group * kGroup + tile * 16, left = channels - first;
  if (left <= 0) return;
  const float* const matrix = grad + b * channels * channels;
  write_fragments(
      fragments + blockIdx.x * depths_of(channels) * kWarp * 2,
      static_cast<int>(left < 16 ? left : 16), static_cast<int>(channels),
      [&](int row, int column) {
        const double sum = static_cast<double>(matrix[(first + row) * channels + column]) +
                           static_cast<double>(matrix[column * channels + first + row]);
        return static_cast<float>(scale * sum);
      });
}

struct GramTerm {
  int channel;

  __device__ int place() const { return channel; }
  __device__ float gradient(float, float, float product) const { return product; }
};

struct GramTerms {
  static constexpr bool kReadsPair = false;
  int channels;

  __device__ int kept(int64_t, int i) const { return i; }
  __device__ int kept_before(int64_t, int group) const {
    return group * kGroup < channels ? group * kGroup : channels;
  }
  __device__ GramTerm of(int64_t, int channel) const { return {channel}; }
};

template <Reading kReading, class T>
const char* forward(const Image<T>& x, double scale, bool once, float* result, void* workspace,
                    Stream stream) {
  double* const totals = static_cast<double*>(workspace);
  float* const partial =
      reinterpret_cast<float*>(totals + product_totals(x.batch, x.channels, false));
  const char* const error =
      products<false, kReading>(x, x, nullptr, x.channels, partial, totals, once, stream);
  if (error != nullptr) return error;
  const int64_t elements = x.batch * x.channels * x.channels;
  return launch(mirror, {(elements + kThreads - 1) / kThreads, kThreads}, stream, totals, result,
                scale, x.batch, x.channels);
}

template <Reading kReading, class T>
const char* backward(const float* grad, const Image<T>& x, double scale, bool once,
                     const MutableImage<T>& grad_x, void* workspace, Stream stream) {
  uint4* const fragments = static_cast<uint4*>(workspace);
  const char* const error =
      launch(fragments_of_gram, {x.batch * groups_of(x.channels) * kRowTiles, kGradientThreads},
             stream, grad, scale, fragments, x.channels);
  if (error != nullptr) return error;
  const GramTerms terms{static_cast<int>(x.channels)};
  return write_gradient<kReading>(x, grad_x, fragments, terms, x.channels, once, stream);
}

}  // namespace

int64_t gram_workspace_bytes(int64_t batch, int64_t channels, int64_t pixels) {
  const int64_t elements = product_totals(batch, channels, false);
  const int64_t runs = product_runs(pixels, channels, false).number;
  return elements * static_cast<int64_t>(sizeof(double)) +
         elements * runs * static_cast<int64_t>(sizeof(float));
}

int64_t gram_backward_workspace_bytes(int64_t batch, int64_t channels) {
  return number_of_fragments(batch, channels, channels) * static_cast<int64_t>(sizeof(uint4));
}

template <class T>
const char* gram(const Image<T>& x, double scale, Precision precision, float* result,
                 void* workspace, Stream stream) {
  const bool once = precision != Precision::float32;
  if (x.by_fours()) return forward<Reading::fours>(x, scale, once, result, workspace, stream);
  return x.flat() ? forward<Reading::flat>(x, scale, once, result, workspace, stream)
                  : forward<Reading::strided>(x, scale, once, result, workspace, stream);
}

template <class T>
const char* gram_backward(const float* grad, const Image<T>& x, double scale,
                          Precision precision, const MutableImage<T>& grad_x, void* workspace,
                          Stream stream) {
  const bool once = precision != Precision::float32;
  if (x.by_fours() && grad_x.by_fours()) {
    return backward<Reading::fours>(grad, x, scale, once, grad_x, workspace, stream);
  }
  return x.flat() && grad_x.flat()
             ? backward<Reading::flat>(grad, x, scale, once, grad_x, workspace, stream)
             : backward<Reading::strided>(grad, x, scale, once, grad_x, workspace, stream);
}

#define MGHF_GRAM(T)                                                                          \
  template const char* gram(const Image<T>&, double, Precision, float*, void*, Stream);       \
  template const char* gram_backward(const float*, const Image<T>&, double, Precision,        \
                                     const MutableImage<T>&, void*, Stream);
MGHF_GRAM(float)
MGHF_GRAM(Half)
MGHF_GRAM(BFloat16)

}  // namespace mghf::cuda
