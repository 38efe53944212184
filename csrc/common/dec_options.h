// Checks of `dec`'s options, which are the same for the CPU and for CUDA.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <string>

#include "checks.h"
#include "dec.h"

namespace mghf {

// The largest float32 squared distance at which a pair is positive by the reference's formula,
// evaluated in float32 step by step as PyTorch does; below 0 if there is none.
inline float largest_positive(double threshold_db, bool rmse, double max_value, int64_t depth) {
  const float threshold = static_cast<float>(threshold_db);
  const float divisor = rmse ? static_cast<float>(std::sqrt(static_cast<double>(depth))) : 1.0f;
  const float peak = static_cast<float>(max_value);
  const auto positive = [&](uint32_t bits) {
    const float distance = std::sqrt(__builtin_bit_cast(float, bits)) / divisor;
    return -20.0f * std::log10(distance / peak) >= threshold;
  };
  uint32_t yes = 0, no = __builtin_bit_cast(uint32_t, FLT_MAX) + 1;
  if (!positive(yes)) return -1;
  while (no - yes > 1) {  // positive floats are ordered as their bits are
    const uint32_t middle = yes + (no - yes) / 2;
    (positive(middle) ? yes : no) = middle;
  }
  return __builtin_bit_cast(float, yes);
}

inline float exponent_of(double temperature, const char* argument, bool inside) {
  STD_TORCH_CHECK(temperature > 0 && std::isfinite(temperature), argument, " is ", temperature,
                  "; allowed is a finite number above 0");
  const double log2_e = 1.4426950408889634;
  // Bounded to stay finite; e^1e30 and e^-1e30 are infinity and 0 all the same.
  return static_cast<float>(std::min(inside ? log2_e / temperature : log2_e, 1e30));
}

inline bool check_choice(const std::string& value, const char* argument, const char* yes,
                         const char* no) {
  STD_TORCH_CHECK(value == yes || value == no, argument, " is '", value, "'; allowed are '", yes,
                  "', '", no, "'");
  return value == yes;
}

// Checks the options for P patches of D values.
inline DecOptions check_dec_options(int64_t patches, int64_t depth, double threshold_db,
                                    double positive_temperature, double negative_temperature,
                                    const std::string& temperature, const std::string& similarity,
                                    double max_value, double norm_floor) {
  STD_TORCH_CHECK(std::isfinite(threshold_db), "threshold_db is ", threshold_db,
                  "; allowed is a finite number");
  STD_TORCH_CHECK(max_value > 0 && std::isfinite(max_value), "max_value is ", max_value,
                  "; allowed is a finite number above 0");
  STD_TORCH_CHECK(norm_floor > 0 && std::isfinite(norm_floor), "norm_floor is ", norm_floor,
                  "; allowed is a finite number above 0");
  const bool inside = check_choice(temperature, "temperature", "inside", "outside");
  const bool rmse = check_choice(similarity, "similarity", "rmse", "l2");
  return {patches, depth, exponent_of(positive_temperature, "positive_temperature", inside),
          exponent_of(negative_temperature, "negative_temperature", inside),
          largest_positive(threshold_db, rmse, max_value, depth),
          // Above 0 in float32 too.
          std::max(static_cast<float>(norm_floor), FLT_MIN)};
}

}  // namespace mghf
