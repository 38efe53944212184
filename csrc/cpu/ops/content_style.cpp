// The op `content_style` on the CPU: argument checks, and the arithmetic on maps between the
// kernels' passes over the pixels. See mghf_fast/reference/content_style.py for the mathematics.

#include <cmath>
#include <numeric>
#include <tuple>

#include "../content_style.h"
#include "arguments.h"
#include "histograms.h"

namespace {

using mghf::Buffer;
using mghf::ImageView;
using mghf::ScalarType;
using mghf::StylePair;
using mghf::Tensor;

constexpr double kVarianceFloor = 1e-8;
constexpr int64_t kRunPixels = 8192;
constexpr int64_t kMostRuns = 64;           // each with its own sums
constexpr int64_t kMostProducts = 1 << 20;  // float64 elements of all runs' products, 8 MiB

// ---- argument checks ----

StylePair check_pair(const Tensor& gt, const Tensor& sr) {
  const StylePair pair = {mghf::read_view(gt, "gt"), mghf::read_view(sr, "sr")};
  mghf::check_same_shape(gt, "gt", sr, "sr");
  const int64_t pixels = pair.sr.height * pair.sr.width;
  STD_TORCH_CHECK(pair.sr.channels > 0 && pixels > 0 && pixels < int64_t{1} << 32, "sr has shape ",
                  mghf::shape_of(sr), "; allowed are 1 to 2^32 - 1 pixels and some channels");
  return pair;
}

// ---- forward ----

// The moments of all channels, [b][Moment][padded channel].
struct Moments {
  std::vector<double> values;
  int64_t padded;

  Moments(const StylePair& pair, int64_t padded)
      : values(pair.sr.batch * mghf::kMoments * padded), padded(padded) {}
  double& of(int64_t b, int64_t moment, int64_t c) {
    return values[(b * mghf::kMoments + moment) * padded + c];
  }
};

// Merges a run of `count` pixels into the moments of the `before` pixels before it.
void merge(double* moments, const double* run, int64_t padded, int64_t channels, double before,
           double count) {
  using namespace mghf;
  constexpr Moment products[][3] = {
      {kSrSr, kMeanSr, kMeanSr},
      {kGtGt, kMeanGt, kMeanGt},
      {kDifferenceDifference, kMeanDifference, kMeanDifference},
      {kSrGt, kMeanSr, kMeanGt},
      {kSrDifference, kMeanSr, kMeanDifference},
  };
  const double share = count / (before + count), rest = before / (before + count);
  for (int64_t c = 0; c < channels; ++c) {
    const auto old = [&](Moment m) -> double& { return moments[m * padded + c]; };
    const auto added = [&](Moment m) { return run[m * padded + c]; };
    const auto step = [&](Moment m) { return added(m) - old(m); };
    for (const auto& [product, x, y] : products) {
      old(product) = rest * old(product) + share * added(product) +
                     rest * share * step(x) * step(y);
    }
    for (const Moment mean : {kMeanSr, kMeanGt, kMeanDifference}) old(mean) += share * step(mean);
    for (const Moment low : {kLowSr, kLowGt}) old(low) = std::min(old(low), added(low));
    for (const Moment high : {kHighSr, kHighGt}) old(high) = std::max(old(high), added(high));
  }
}

// The moments of a pair that is stored pixel by pixel.
void moments_of_runs(const mghf::ContentStyleKernels& kernels, const StylePair& pair,
                     Moments& moments) {
  const mghf::PixelRuns runs(pair.sr, kRunPixels, kMostRuns);
  const int64_t size = mghf::kMoments * moments.padded;
  const Buffer<double> sums(pair.sr.batch * runs.count * size);
  mghf::for_each(pair.sr.batch * runs.count, kernels.workspace_bytes(pair, 1),
                 [&](int64_t i, void* workspace) {
                   const int64_t run = i % runs.count;
                   kernels.run_moments(pair, i / runs.count, runs.begin(run), runs.size(run),
                                       sums.get() + i * size, workspace);
                 });
  for (int64_t b = 0; b < pair.sr.batch; ++b) {
    double* total = moments.values.data() + b * size;
    const double* first = sums.get() + b * runs.count * size;
    std::copy_n(first, size, total);
    for (int64_t run = 1; run < runs.count; ++run) {
      merge(total, first + run * size, moments.padded, pair.sr.channels,
            static_cast<double>(runs.begin(run)), static_cast<double>(runs.size(run)));
    }
  }
}

// The range of a map for its histogram; NaN, as the entropy kernels expect, if it is not finite.
std::pair<float, float> range_of(Moments& moments, int64_t b, int64_t c, bool sr) {
  const auto low = static_cast<float>(moments.of(b, sr ? mghf::kLowSr : mghf::kLowGt, c));
  const auto high = static_cast<float>(moments.of(b, sr ? mghf::kHighSr : mghf::kHighGt, c));
  // A NaN or an infinity anywhere in the map makes its mean NaN.
  const double mean = moments.of(b, sr ? mghf::kMeanSr : mghf::kMeanGt, c);
  if (std::isfinite(mean) && std::isfinite(high - low)) return {low, high};
  return {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::quiet_NaN()};
}

void moments_of(const mghf::ContentStyleKernels& kernels, const StylePair& pair,
                Moments& moments) {
  if (!kernels.by_maps(pair)) return moments_of_runs(kernels, pair, moments);
  const int64_t channels = pair.sr.channels;
  mghf::for_each(pair.sr.batch * channels, kernels.workspace_bytes(pair, 1),
                 [&](int64_t i, void* workspace) {
                   double map[mghf::kMoments];
                   kernels.map_moments(pair, i / channels, i % channels, map, workspace);
                   for (int64_t k = 0; k < mghf::kMoments; ++k) {
                     moments.of(i / channels, k, i % channels) = map[k];
                   }
                 });
}

// The entropies of both images' maps, (B, C) each, and their moments.
struct Entropies {
  std::vector<double> gt, sr;
};

Entropies entropies_of(const StylePair& pair, int64_t bins, Moments& moments) {
  const auto& kernels = MGHF_KERNELS_OF(content_style);
  const auto& histograms = MGHF_KERNELS_OF(entropy);
  const int64_t channels = pair.sr.channels, maps = pair.sr.batch * channels;
  Entropies entropies{std::vector<double>(maps), std::vector<double>(maps)};
  const auto of_map = [&](const ImageView& x, int64_t i, bool sr, void* workspace) {
    const auto [low, high] = range_of(moments, i / channels, i % channels, sr);
    (sr ? entropies.sr : entropies.gt)[i] = histograms.map_entropy(
        x, i / channels, i % channels, low, high, bins, workspace);
  };
  const size_t bytes = histograms.map_workspace_bytes(bins);
  if (kernels.by_maps(pair)) {
    // All of a map at once, as long as it is in the cache.
    mghf::for_each(maps, std::max(kernels.workspace_bytes(pair, 1), bytes),
                   [&](int64_t i, void* workspace) {
                     double map[mghf::kMoments];
                     kernels.map_moments(pair, i / channels, i % channels, map, workspace);
                     for (int64_t k = 0; k < mghf::kMoments; ++k) {
                       moments.of(i / channels, k, i % channels) = map[k];
                     }
                     of_map(pair.gt, i, false, workspace);
                     of_map(pair.sr, i, true, workspace);
                   });
    return entropies;
  }
  moments_of_runs(kernels, pair, moments);
  for (const bool sr : {false, true}) {
    const ImageView& x = sr ? pair.sr : pair.gt;
    if (histograms.by_maps(x, bins)) {
      mghf::for_each(maps, bytes, [&](int64_t i, void* workspace) { of_map(x, i, sr, workspace); });
      continue;
    }
    const int64_t padded = histograms.padded_channels(channels);
    const auto size = static_cast<size_t>(x.batch * padded);
    mghf::StackRanges ranges{std::vector<float>(size), std::vector<float>(size)};
    for (int64_t i = 0; i < maps; ++i) {
      const int64_t at = i / channels * padded + i % channels;
      std::tie(ranges.low[at], ranges.high[at]) =
          range_of(moments, i / channels, i % channels, sr);
    }
    mghf::count_entropies(histograms, x, ranges, bins, (sr ? entropies.sr : entropies.gt).data());
  }
  return entropies;
}

// The `top_m` most important maps of an image, most important first: compared in float32, ties to
// the lower index, NaN above all.
std::vector<int64_t> most_important(const std::vector<double>& importance, int64_t top_m) {
  std::vector<int64_t> order(importance.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    const auto x = static_cast<float>(importance[i]), y = static_cast<float>(importance[j]);
    return x > y || (x != x && y == y);
  });
  order.resize(top_m);
  return order;
}

// The rows of the moments that the forward returns for the backward.
enum Row { kMeanS, kMeanG, kMeanD, kScale, kSlope, kExcess, kRows };

// The correlation term of a map, 1 - rho, and the coefficients of its gradient, which is, per pixel
// of S and times -n,
// scale (G - mean G) - slope (S - mean S) = excess (S - mean S) - scale (D - mean D), D = S - G.
struct Correlation {
  double distance, scale, slope, excess;

  Correlation(double var_s, double var_g, double var_d, double cov, double cov_sd) {
    var_s = var_s < 0 ? 0 : var_s;  // by rounding
    var_g = var_g < 0 ? 0 : var_g;
    const bool floored_s = var_s <= kVarianceFloor, floored_g = var_g <= kVarianceFloor;
    const double root = std::sqrt((floored_s ? kVarianceFloor : var_s) *
                                  (floored_g ? kVarianceFloor : var_g));
    scale = 1 / root;
    slope = floored_s ? 0 : cov / var_s / root;
    if (!floored_s && !floored_g && var_d < root) {
      // Almost equal maps: from the moments of D, because those of S and G would cancel.
      const double apart = (2 * cov_sd - var_d) / (std::sqrt(var_s) + std::sqrt(var_g));
      distance = (var_d - apart * apart) / (2 * root);
      excess = cov_sd / var_s / root;
    } else {
      distance = 1 - cov / root;
      excess = scale - slope;
    }
  }
};

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Result content_style(const Tensor& gt, const Tensor& sr, int64_t top_m, double alpha, double gamma,
                     int64_t bins, const std::string& precision) {
  mghf::check_precision(precision);
  const StylePair pair = check_pair(gt, sr);
  const int64_t batch = pair.sr.batch, channels = pair.sr.channels;
  const int64_t pixels = pair.sr.height * pair.sr.width;
  mghf::check_top_m(top_m, channels);
  mghf::check_bins(bins);
  const auto& kernels = MGHF_KERNELS_OF(content_style);

  const auto floats = [&](std::initializer_list<int64_t> shape) {
    return mghf::new_tensor(sr, {shape.begin(), shape.size()}, ScalarType::Float);
  };
  Tensor naive = floats({batch}), mse = floats({batch}), correlation = floats({batch});
  Tensor gram = floats({batch}), weights = floats({batch, top_m});
  Tensor moments_out = floats({batch, kRows, top_m}), difference = floats({batch, top_m, top_m});
  const int64_t kept_shape[] = {batch, top_m};
  Tensor kept = mghf::new_tensor(sr, kept_shape, ScalarType::Long);

  Moments moments(pair, kernels.padded(channels));
  // Without kept maps only MGHF-n is left, for which the moments are enough.
  Entropies entropies;
  if (top_m == 0) {
    moments_of(kernels, pair, moments);
  } else {
    entropies = entropies_of(pair, bins, moments);
  }

  // Per image: the kept maps, most important first, their weights, and where they are among the
  // kept maps in ascending order.
  std::vector<int64_t> ascending(batch * top_m), place(batch * top_m);
  std::vector<double> weight(batch * top_m);
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<double> importance(channels);
    double squares = 0;
    for (int64_t c = 0; c < channels; ++c) {
      if (top_m > 0) {
        importance[c] =
            1 - (entropies.gt[b * channels + c] + entropies.sr[b * channels + c]) / 2;
      }
      const double mean = moments.of(b, mghf::kMeanDifference, c);
      squares += moments.of(b, mghf::kDifferenceDifference, c) + mean * mean;
    }
    const std::vector<int64_t> order = most_important(importance, top_m);
    std::copy(order.begin(), order.end(), kept.mutable_data_ptr<int64_t>() + b * top_m);
    int64_t* sorted = ascending.data() + b * top_m;
    std::copy(order.begin(), order.end(), sorted);
    std::sort(sorted, sorted + top_m);

    double weighted_squares = 0, distance = 0;
    float* rows = moments_out.mutable_data_ptr<float>() + b * kRows * top_m;
    for (int64_t i = 0; i < top_m; ++i) {
      const int64_t c = order[i];
      const auto of = [&](mghf::Moment moment) { return moments.of(b, moment, c); };
      const double w = std::pow(1 + alpha * importance[c], gamma);
      const double mean = of(mghf::kMeanDifference), var_d = of(mghf::kDifferenceDifference);
      const Correlation rho(of(mghf::kSrSr), of(mghf::kGtGt), var_d, of(mghf::kSrGt),
                            of(mghf::kSrDifference));
      weight[b * top_m + i] = w;
      weights.mutable_data_ptr<float>()[b * top_m + i] = static_cast<float>(w);
      place[b * top_m + i] = std::lower_bound(sorted, sorted + top_m, c) - sorted;
      weighted_squares += w * w * (var_d + mean * mean);
      distance += rho.distance;
      const auto row = [&](Row r, double value) {
        rows[r * top_m + i] = static_cast<float>(value);
      };
      row(kMeanS, of(mghf::kMeanSr));
      row(kMeanG, of(mghf::kMeanGt));
      row(kMeanD, mean);
      row(kScale, rho.scale);
      row(kSlope, rho.slope);
      row(kExcess, rho.excess);
    }
    const auto maps = static_cast<double>(std::max<int64_t>(top_m, 1));
    naive.mutable_data_ptr<float>()[b] =
        static_cast<float>(squares / static_cast<double>(channels));
    mse.mutable_data_ptr<float>()[b] = static_cast<float>(weighted_squares / maps);
    correlation.mutable_data_ptr<float>()[b] = static_cast<float>(distance / maps);
  }

  if (top_m == 0) {
    std::fill_n(gram.mutable_data_ptr<float>(), batch, 0.0f);
    return {naive, mse, correlation, gram, kept, weights, moments_out, difference};
  }

  // Gram's difference.
  const int64_t width = kernels.padded(top_m), size = top_m * width;
  const mghf::PixelRuns runs(pair.sr, kRunPixels,
                        std::clamp<int64_t>(kMostProducts / size, 2, kMostRuns));
  const Buffer<double> products(batch * runs.count * size);
  mghf::for_each(batch * runs.count, kernels.workspace_bytes(pair, top_m),
                 [&](int64_t i, void* workspace) {
                   const int64_t b = i / runs.count, run = i % runs.count;
                   kernels.run_product(pair, b, runs.begin(run), runs.size(run),
                                       {ascending.data() + b * top_m, top_m},
                                       products.get() + i * size, workspace);
                 });
  for (int64_t b = 0; b < batch; ++b) {
    double* total = products.get() + b * runs.count * size;
    for (int64_t run = 1; run < runs.count; ++run) {
      for (int64_t i = 0; i < size; ++i) total[i] += total[run * size + i];
    }
    const int64_t* at = place.data() + b * top_m;
    const double* w = weight.data() + b * top_m;
    const double norm = 2 * static_cast<double>(top_m) * static_cast<double>(pixels);
    float* out = difference.mutable_data_ptr<float>() + b * top_m * top_m;
    double squares = 0;
    for (int64_t i = 0; i < top_m; ++i) {
      for (int64_t j = 0; j < top_m; ++j) {
        const double sum = total[at[i] * width + at[j]] + total[at[j] * width + at[i]];
        const double value = w[i] * w[j] * sum / norm;
        out[i * top_m + j] = static_cast<float>(value);
        squares += value * value;
      }
    }
    gram.mutable_data_ptr<float>()[b] = static_cast<float>(squares / static_cast<double>(top_m));
  }
  return {naive, mse, correlation, gram, kept, weights, moments_out, difference};
}

// ---- backward ----

// A tensor's elements by index, any strides.
template <class T>
struct Elements {
  const T* data;
  int64_t strides[3] = {};

  explicit Elements(const Tensor& tensor) : data(tensor.const_data_ptr<T>()) {
    for (int64_t d = 0; d < tensor.dim(); ++d) strides[d] = tensor.stride(d);
  }
  T operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data[i * strides[0] + j * strides[1] + k * strides[2]];
  }
};

void content_style_backward_into_(Tensor grad_sr, const Tensor& grad_naive,
                                  const Tensor& grad_mse, const Tensor& grad_correlation,
                                  const Tensor& grad_gram, const Tensor& gt, const Tensor& sr,
                                  const Tensor& kept, const Tensor& weights,
                                  const Tensor& moments, const Tensor& difference,
                                  const std::string& precision) {
  using namespace mghf;
  check_precision(precision);
  const StylePair pair = check_pair(gt, sr);
  check_same_shape(grad_sr, "grad_sr", sr, "sr");
  STD_TORCH_CHECK(grad_sr.scalar_type() == sr.scalar_type(), "grad_sr and sr are not of one type");
  const int64_t batch = pair.sr.batch, channels = pair.sr.channels;
  const int64_t pixels = pair.sr.height * pair.sr.width;
  for (const Tensor* grad : {&grad_naive, &grad_mse, &grad_correlation, &grad_gram}) {
    check_float32(*grad, "grad", 1);
    check_shape(*grad, "grad", {batch});
  }
  STD_TORCH_CHECK(kept.is_cpu() && kept.scalar_type() == ScalarType::Long && kept.dim() == 2,
                  "kept is not an int64 matrix on the CPU");
  const int64_t top_m = kept.size(1);
  check_shape(kept, "kept", {batch, top_m});
  check_float32(weights, "weights", 2);
  check_shape(weights, "weights", {batch, top_m});
  check_float32(moments, "moments", 3);
  check_shape(moments, "moments", {batch, kRows, top_m});
  check_float32(difference, "difference", 3);
  check_shape(difference, "difference", {batch, top_m, top_m});

  const auto& kernels = MGHF_KERNELS_OF(content_style);
  const int64_t padded = kernels.padded(channels), width = kernels.padded(top_m);
  const Buffer<float> coefficients(batch * kCoefficients * padded);
  const Buffer<float> matrices(batch * top_m * width);
  std::fill_n(coefficients.get(), batch * kCoefficients * padded, 0.0f);
  std::fill_n(matrices.get(), batch * top_m * width, 0.0f);
  std::vector<int64_t> ascending(batch * top_m);

  const Elements<int64_t> channel(kept);
  const Elements<float> w(weights), moment(moments), d(difference);
  const auto m = static_cast<double>(top_m), n = static_cast<double>(pixels);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t* sorted = ascending.data() + b * top_m;
    for (int64_t i = 0; i < top_m; ++i) {
      sorted[i] = channel(b, i);
      STD_TORCH_CHECK(sorted[i] >= 0 && sorted[i] < channels, "kept has the index ", sorted[i],
                      "; allowed is 0 to ", channels - 1);
    }
    std::sort(sorted, sorted + top_m);
    STD_TORCH_CHECK(std::adjacent_find(sorted, sorted + top_m) == sorted + top_m,
                    "kept names a map twice");

    float* of = coefficients.get() + b * kCoefficients * padded;
    const double naive = 2 * static_cast<double>(Elements<float>(grad_naive)(b)) /
                         (static_cast<double>(channels) * n);
    const double mse = 2 * static_cast<double>(Elements<float>(grad_mse)(b)) / (m * n);
    const double correlation = static_cast<double>(Elements<float>(grad_correlation)(b)) / (m * n);
    const double gram = 4 * static_cast<double>(Elements<float>(grad_gram)(b)) / (m * m * n);
    std::fill_n(of + kOfDifference * padded, channels, static_cast<float>(naive));
    std::vector<int64_t> place(top_m);
    for (int64_t i = 0; i < top_m; ++i) {
      const int64_t c = channel(b, i);
      const auto weight = static_cast<double>(w(b, i));
      place[i] = std::lower_bound(sorted, sorted + top_m, c) - sorted;
      const auto row = [&](Row r) { return static_cast<double>(moment(b, r, i)); };
      const auto set = [&](Coefficient k, double value) {
        of[k * padded + c] = static_cast<float>(value);
      };
      const bool like = 2 * std::abs(row(kExcess)) < row(kScale);
      set(kOfDifference, naive + mse * weight * weight);
      set(kOfCentred, correlation * (like ? -row(kExcess) : row(kSlope)));
      set(kMeanOfCentred, row(kMeanS));
      set(kOfOther, correlation * (like ? row(kScale) : -row(kScale)));
      set(kMeanOfOther, like ? row(kMeanD) : row(kMeanG));
      set(kLike, like ? 1 : 0);
    }
    for (int64_t i = 0; i < top_m; ++i) {
      for (int64_t j = 0; j < top_m; ++j) {
        matrices.get()[(b * top_m + place[i]) * width + place[j]] =
            static_cast<float>(gram * static_cast<double>(w(b, i)) *
                               static_cast<double>(w(b, j)) * static_cast<double>(d(b, i, j)));
      }
    }
  }

  const MutableImageView out = write_view(grad_sr, "grad_sr");
  const PixelRuns runs(pair.sr, kRunPixels, int64_t{1} << 40);
  for_each(batch * runs.count, kernels.workspace_bytes(pair, top_m),
           [&](int64_t i, void* workspace) {
             const int64_t b = i / runs.count, run = i % runs.count;
             kernels.run_gradient(pair, out, b, runs.begin(run), runs.size(run),
                                  {ascending.data() + b * top_m, top_m},
                                  coefficients.get() + b * kCoefficients * padded,
                                  matrices.get() + b * top_m * width, workspace);
           });
}

Tensor content_style_backward(const Tensor& grad_naive, const Tensor& grad_mse,
                              const Tensor& grad_correlation, const Tensor& grad_gram,
                              const Tensor& gt, const Tensor& sr, const Tensor& kept,
                              const Tensor& weights, const Tensor& moments,
                              const Tensor& difference, const std::string& precision) {
  mghf::check_image(sr, "sr");
  Tensor grad_sr = mghf::new_image_like(sr, sr.size(1));
  content_style_backward_into_(grad_sr, grad_naive, grad_mse, grad_correlation, grad_gram, gt, sr,
                               kept, weights, moments, difference, precision);
  return grad_sr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("content_style", TORCH_BOX(&content_style));
  m.impl("content_style_backward", TORCH_BOX(&content_style_backward));
  m.impl("content_style_backward_into_", TORCH_BOX(&content_style_backward_into_));
}
