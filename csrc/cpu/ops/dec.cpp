// The op `dec` on the CPU: argument checks and the rounds of its kernels' tasks.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../common/dec_options.h"
#include "../dec.h"
#include "arguments.h"

namespace {

using mghf::check_dec_options;
using mghf::check_float32;
using mghf::check_same_shape;
using mghf::new_tensor;
using mghf::Tensor;

mghf::DecOptions check_dec(const Tensor& sr, const Tensor& gt, double threshold_db,
                           double positive_temperature, double negative_temperature,
                           const std::string& temperature, const std::string& similarity,
                           double max_value, double norm_floor) {
  check_float32(sr, "sr", 2);
  check_float32(gt, "gt", 2);
  check_same_shape(gt, "gt", sr, "sr");
  return check_dec_options(sr.size(0), sr.size(1), threshold_db, positive_temperature,
                           negative_temperature, temperature, similarity, max_value, norm_floor);
}

// ---- tasks ----

mghf::PatchesView view(const Tensor& patches) {
  return {patches.const_data_ptr<float>(), patches.stride(0), patches.stride(1)};
}

Tensor new_memory(const Tensor& like, size_t bytes) {
  const int64_t shape[] = {static_cast<int64_t>(bytes / sizeof(float))};
  return new_tensor(like, shape);
}

// Calls task(tile, other, workspace) for all pairs of tiles, in rounds: in round r tile a meets
// tile (r - a) mod tiles. A round's tasks share no tile, and tile a meets the others in the same
// order whatever the number of threads.
template <class Task>
void for_each_pair(int64_t tiles, size_t workspace_bytes, const Task& task) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t round = 0; round < tiles; ++round) {
    pairs.clear();
    for (int64_t a = 0; a < tiles; ++a) {
      const int64_t b = (round - a + tiles) % tiles;
      if (a <= b) pairs.emplace_back(a, b);
    }
    mghf::for_each(static_cast<int64_t>(pairs.size()), workspace_bytes,
                   [&](int64_t index, void* workspace) {
                     task(pairs[index].first, pairs[index].second, workspace);
                   });
  }
}

// ---- implementations ----

// The loss, and for every row the sums of exp(cos(S_i, S_j)/t) + 2 exp(cos(G_i, S_j)/t) over its
// positives and its negatives, (2, P), the latter -1 where it has none. With the temperature
// outside, exp(cos) takes the place of exp(cos/t).
std::tuple<Tensor, Tensor> dec(const Tensor& sr, const Tensor& gt, double threshold_db,
                               double positive_temperature, double negative_temperature,
                               const std::string& temperature, const std::string& similarity,
                               double max_value, double norm_floor) {
  const auto options = check_dec(sr, gt, threshold_db, positive_temperature, negative_temperature,
                                 temperature, similarity, max_value, norm_floor);
  const auto& kernels = MGHF_KERNELS_OF(dec);
  const int64_t patches = options.patches, tile = kernels.tile(options);
  const int64_t tiles = (patches + tile - 1) / tile;
  const auto count = static_cast<size_t>(patches);
  std::vector<double> positive(count), negative(count);
  const auto has_negative = std::make_unique<bool[]>(count);
  const mghf::DecSums sums{positive.data(), negative.data(), has_negative.get()};

  Tensor memory = new_memory(sr, kernels.packed_bytes(options, false));
  void* packed = memory.mutable_data_ptr();
  mghf::for_each(tiles, 0, [&](int64_t index, void*) {
    kernels.pack(options, view(sr), view(gt), nullptr, index, packed);
  });
  for_each_pair(tiles, kernels.workspace_bytes(options, false),
                [&](int64_t a, int64_t b, void* workspace) {
                  kernels.forward(options, a, b, packed, sums, workspace);
                });

  const int64_t statistics_shape[] = {2, patches};
  Tensor statistics = new_tensor(sr, statistics_shape);
  float* saved = statistics.mutable_data_ptr<float>();
  // 1 / t outside the exponentials
  const double offset =
      temperature == "outside" ? std::log(negative_temperature / positive_temperature) : 0;
  double total = 0;
  int64_t rows = 0;
  for (size_t i = 0; i < count; ++i) {
    saved[i] = static_cast<float>(positive[i]);
    saved[count + i] = has_negative[i] ? static_cast<float>(negative[i]) : -1.0f;
    rows += has_negative[i];
    // A row without negatives does not count, but a NaN in it makes the loss NaN.
    total += has_negative[i] ? std::log(positive[i]) - std::log(negative[i]) + offset
                             : 0 * std::log(positive[i]);
  }
  Tensor loss = new_tensor(sr, {});
  *loss.mutable_data_ptr<float>() =
      static_cast<float>(-total / static_cast<double>(std::max<int64_t>(rows, 1)));
  return {loss, statistics};
}

Tensor dec_backward(const Tensor& grad, const Tensor& sr, const Tensor& gt,
                    const Tensor& statistics, double threshold_db, double positive_temperature,
                    double negative_temperature, const std::string& temperature,
                    const std::string& similarity, double max_value, double norm_floor) {
  const auto options = check_dec(sr, gt, threshold_db, positive_temperature, negative_temperature,
                                 temperature, similarity, max_value, norm_floor);
  const int64_t patches = options.patches;
  check_float32(grad, "grad", 0);
  check_float32(statistics, "statistics", 2);
  STD_TORCH_CHECK(statistics.size(0) == 2 && statistics.size(1) == patches, "statistics has shape ",
                  mghf::shape_of(statistics), "; allowed is (2, P), P = ", patches);
  const auto& kernels = MGHF_KERNELS_OF(dec);
  const int64_t tile = kernels.tile(options), tiles = (patches + tile - 1) / tile;

  const float* saved = statistics.const_data_ptr<float>();
  const auto sum_of = [&](int64_t which, int64_t i) {
    return saved[which * statistics.stride(0) + i * statistics.stride(1)];
  };
  int64_t rows = 0;
  for (int64_t i = 0; i < patches; ++i) rows += sum_of(1, i) != -1.0f;
  const double scale = -static_cast<double>(*grad.const_data_ptr<float>()) /
                       static_cast<double>(std::max<int64_t>(rows, 1));
  const bool inside = temperature == "inside";
  std::vector<float> positive(static_cast<size_t>(patches)), negative(positive.size());
  for (int64_t i = 0; i < patches; ++i) {
    const bool has_negative = sum_of(1, i) != -1.0f;
    const double row_scale = has_negative ? scale : 0;
    positive[i] =
        static_cast<float>(row_scale / (inside ? positive_temperature : 1) / sum_of(0, i));
    negative[i] =
        static_cast<float>(-row_scale / (inside ? negative_temperature : 1) / sum_of(1, i));
  }
  const mghf::DecFactors factors{positive.data(), negative.data()};

  Tensor memory = new_memory(sr, kernels.packed_bytes(options, true));
  void* packed = memory.mutable_data_ptr();
  mghf::for_each(tiles, 0, [&](int64_t index, void*) {
    kernels.pack(options, view(sr), view(gt), &factors, index, packed);
  });
  for_each_pair(tiles, kernels.workspace_bytes(options, true),
                [&](int64_t a, int64_t b, void* workspace) {
                  kernels.backward(options, a, b, packed, workspace);
                });
  Tensor grad_sr = new_tensor(sr, sr.sizes());
  float* out = grad_sr.mutable_data_ptr<float>();
  mghf::for_each(tiles, 0, [&](int64_t index, void*) {
    kernels.project(options, index, packed, out);
  });
  return grad_sr;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(MGHF_LIBRARY, CPU, m) {
  m.impl("dec", TORCH_BOX(&dec));
  m.impl("dec_backward", TORCH_BOX(&dec_backward));
}
