// The moments of both stacks' maps, and their statistics; see content_style.cu.
#pragma once

#include "content_style.h"
#include "maps_product.h"

namespace mghf::cuda {

namespace {

constexpr double kVarianceFloor = 1e-8;

int64_t blocks_for(int64_t number, int64_t of_block) { return (number + of_block - 1) / of_block; }

// ---- moments ----

// Rows of a run's results: sums of deviations from the pivots, ranges, the pivots.
enum Partial {
  kSumS, kSumG, kSumD, kSumSS, kSumGG, kSumDD, kSumSG, kSumSD,
  kLowS, kLowG, kHighS, kHighG,
  kPivotS, kPivotG, kPivotD,
  kPartials,
};
constexpr int kSums = kLowS;        // the number of sums
constexpr int kMerged = kPivotS;    // the number of rows that every thread has a part of

// Rows of a map's statistics. The backward gets the first ones: its gradient of the correlation is,
// per pixel and times -n,
//
//     scale (G - mean G) - slope (S - mean S) = excess (S - mean S) - scale (D - mean D)
enum Statistic {
  kMeanS, kMeanG, kMeanD, kScale, kSlope, kExcess,
  kDistance,  // 1 - rho
  kSquare,    // mean D^2
  kStatistics,
};
static_assert(kDistance == kStyleMoments);

Runs runs_of_moments(int64_t pixels, bool by_maps) {
  return by_maps ? Runs(pixels, 8192, 64) : Runs(pixels, 512, 512);
}
Runs runs_of_counts(int64_t pixels, bool by_maps) {
  return by_maps ? Runs(pixels, 16384, 64) : Runs(pixels, 2048, 256);
}

// How often a loop of loads is unrolled, to keep several in flight.
template <Reading kReading>
constexpr int kAtOnce = kReading == Reading::fours ? 2 : 4;

template <class Number>
__device__ __forceinline__ Number combined(int quantity, Number a, Number b) {
  if (quantity < kSums) return a + b;
  return (quantity < kHighS ? b < a : b > a) ? b : a;
}

struct Pivots {
  float s = 0, g = 0, d = 0;
};

// Means of some pixels, relative to one of them, so that a constant map deviates by exactly 0.
template <class T, bool kFlat>
__device__ Pivots pivots_of(const Image<T>& gt, const T* g_map, const Image<T>& sr, const T* s_map,
                            int64_t begin, int64_t end) {
  constexpr int kMost = 8;
  const int number = end - begin < kMost ? static_cast<int>(end - begin) : kMost;
  float s[kMost], g[kMost];
  MGHF_UNROLL_ALL
  for (int i = 0; i < kMost; ++i) {
    const int64_t p = begin + (i < number ? i : 0);
    s[i] = to_float(s_map[sr.template offset<kFlat>(p)]);
    g[i] = to_float(g_map[gt.template offset<kFlat>(p)]);
  }
  Pivots sums;
  MGHF_UNROLL_ALL
  for (int i = 1; i < kMost; ++i) {
    sums.s += s[i] - s[0];
    sums.g += g[i] - g[0];
    sums.d += (s[i] - g[i]) - (s[0] - g[0]);
  }
  const float share = 1.0f / static_cast<float>(number);
  return {s[0] + sums.s * share, g[0] + sums.g * share, (s[0] - g[0]) + sums.d * share};
}

// A block takes a run of one map (kByMaps), or of 32 maps, one for each lane of a warp.
template <class T, Reading kReading, bool kByMaps>
__global__ void __launch_bounds__(kSweepThreads)
    moments_of_runs(Image<T> gt, Image<T> sr, float* partial, Runs runs) {
  __shared__ float of_threads[kMerged][kSweepWarps][kWarp];
  constexpr int kStep = pixels_of(kReading);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, row = thread / kWarp;
  const RunPlace place(blockIdx.x, runs.number, sr.channels, kByMaps ? 1 : kWarp);
  const int64_t channel = place.channel + (kByMaps ? 0 : lane);
  const bool inside = channel < sr.channels;
  float of[kMerged] = {0, 0, 0, 0, 0, 0, 0, 0, INFINITY, INFINITY, -INFINITY, -INFINITY};
  Pivots pivots;
  if (inside) {
    const T *const s_map = sr.map(place.b, channel), *const g_map = gt.map(place.b, channel);
    const auto begin = static_cast<unsigned>(runs.begin(place.run));
    const auto end = static_cast<unsigned>(runs.end(place.run, sr.pixels()));
    pivots = pivots_of<T, kReading != Reading::strided>(gt, g_map, sr, s_map, begin, end);
    constexpr unsigned kEach = (kByMaps ? kSweepThreads : kSweepWarps) * kStep;
    const unsigned first = begin + (kByMaps ? thread * kStep : row);
    const unsigned turns = turns_to(end, first, kEach);
    MGHF_UNROLL(kAtOnce<kReading>)
    for (unsigned turn = 0; turn < turns; ++turn) {
      const unsigned p = first + turn * kEach;
      float s_values[kStep], g_values[kStep];
      sr.template read<kReading>(s_values, s_map, p);
      gt.template read<kReading>(g_values, g_map, p);
      MGHF_UNROLL_ALL
      for (int i = 0; i < kStep; ++i) {
        const float s = s_values[i], g = g_values[i];
        const float s0 = s - pivots.s, g0 = g - pivots.g, d0 = (s - g) - pivots.d;
        of[kSumS] += s0;
        of[kSumG] += g0;
        of[kSumD] += d0;
        of[kSumSS] += s0 * s0;
        of[kSumGG] += g0 * g0;
        of[kSumDD] += d0 * d0;
        of[kSumSG] += s0 * g0;
        of[kSumSD] += s0 * d0;
        of[kLowS] = smaller(of[kLowS], s);
        of[kLowG] = smaller(of[kLowG], g);
        of[kHighS] = larger(of[kHighS], s);
        of[kHighG] = larger(of[kHighG], g);
      }
    }
  }
  MGHF_UNROLL_ALL
  for (int q = 0; q < kMerged; ++q) of_threads[q][row][lane] = of[q];
  __syncthreads();
  float* const target =
      partial + (place.b * runs.number + place.run) * kPartials * sr.channels + channel;
  const bool stores = inside && (!kByMaps || lane == 0);
  for (int q = row; q < kMerged; q += kSweepWarps) {
    float value = of_threads[q][0][lane];
    for (int i = 1; i < kSweepWarps; ++i) value = combined(q, value, of_threads[q][i][lane]);
    if (kByMaps) {
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        value = combined(q, value, __shfl_xor_sync(kAllLanes, value, mask));
      }
    }
    if (stores) target[q * sr.channels] = value;
  }
  if (stores && row == kSweepWarps - 1) {
    target[kPivotS * sr.channels] = pivots.s;
    target[kPivotG * sr.channels] = pivots.g;
    target[kPivotD * sr.channels] = pivots.d;
  }
}

// ---- statistics ----

// Ranges of the maps, first G's, (2, B, C) each.
struct PairRanges {
  float *lows, *highs;
};

constexpr int kChannelsOfMerge = 8;
constexpr int kSlots = kSweepThreads / kChannelsOfMerge;

// The statistics of a map from its means, variances and covariances.
struct Statistics {
  double of[kStatistics];

  __device__ Statistics(double s, double g, double d, double ss, double gg, double dd, double sg,
                        double sd) {
    ss = ss < 0 ? 0 : ss;  // by rounding
    gg = gg < 0 ? 0 : gg;
    const bool floored_s = ss <= kVarianceFloor, floored_g = gg <= kVarianceFloor;
    const double root =
        sqrt(floored_s ? kVarianceFloor : ss) * sqrt(floored_g ? kVarianceFloor : gg);
    // Almost equal maps: from the moments of D, because those of S and G would cancel.
    const bool alike = !floored_s && !floored_g && dd < root;
    const double apart = (2 * sd - dd) / (sqrt(ss) + sqrt(gg));
    const double slope = floored_s ? 0 : sg / ss / root;
    of[kMeanS] = s;
    of[kMeanG] = g;
    of[kMeanD] = d;
    of[kScale] = 1 / root;
    of[kSlope] = slope;
    of[kExcess] = alike ? sd / ss / root : 1 / root - slope;
    of[kDistance] = alike ? (dd - apart * apart) / (2 * root) : 1 - sg / root;
    of[kSquare] = dd + d * d;
  }
};

// Statistics of each map from those of its runs, in float64, about the first run's pivots. A map
// with a NaN or an infinity, seen from its mean, gets NaN for its range. Also clears the counts.
__global__ void __launch_bounds__(kSweepThreads)
    merge_runs(const float* partial, double* statistics, PairRanges ranges, int* counts,
               int64_t number_of_counts, int64_t batch, int64_t channels, int64_t pixels,
               Runs runs) {
  __shared__ double of_slots[kMerged][kSlots][kChannelsOfMerge];
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kSweepThreads + thread; i < number_of_counts;
       i += static_cast<int64_t>(gridDim.x) * kSweepThreads) {
    counts[i] = 0;
  }
  const int64_t groups = (channels + kChannelsOfMerge - 1) / kChannelsOfMerge;
  const int lane = thread % kChannelsOfMerge, slot = thread / kChannelsOfMerge;
  const int64_t b = blockIdx.x / groups, channel = blockIdx.x % groups * kChannelsOfMerge + lane;
  const bool inside = channel < channels;
  const auto read = [&](int64_t run, int row) {
    return static_cast<double>(partial[((b * runs.number + run) * kPartials + row) * channels +
                                       channel]);
  };
  double of[kMerged] = {0, 0, 0, 0, 0, 0, 0, 0, INFINITY, INFINITY, -INFINITY, -INFINITY};
  double origin_s = 0, origin_g = 0, origin_d = 0;
  if (inside) {
    origin_s = read(0, kPivotS);
    origin_g = read(0, kPivotG);
    origin_d = read(0, kPivotD);
    MGHF_UNROLL(2)
    for (int64_t run = slot; run < runs.number; run += kSlots) {
      const double count = static_cast<double>(runs.end(run, pixels) - runs.begin(run));
      const double share = count / static_cast<double>(pixels), each = 1 / count;
      const double s = read(run, kSumS) * each, g = read(run, kSumG) * each;
      const double d = read(run, kSumD) * each;
      const double from_s = read(run, kPivotS) + s - origin_s;
      const double from_g = read(run, kPivotG) + g - origin_g;
      const double from_d = read(run, kPivotD) + d - origin_d;
      of[kSumS] += share * from_s;
      of[kSumG] += share * from_g;
      of[kSumD] += share * from_d;
      of[kSumSS] += share * (read(run, kSumSS) * each - s * s + from_s * from_s);
      of[kSumGG] += share * (read(run, kSumGG) * each - g * g + from_g * from_g);
      of[kSumDD] += share * (read(run, kSumDD) * each - d * d + from_d * from_d);
      of[kSumSG] += share * (read(run, kSumSG) * each - s * g + from_s * from_g);
      of[kSumSD] += share * (read(run, kSumSD) * each - s * d + from_s * from_d);
      MGHF_UNROLL_ALL
      for (int q = kLowS; q < kMerged; ++q) of[q] = combined(q, of[q], read(run, q));
    }
  }
  MGHF_UNROLL_ALL
  for (int q = 0; q < kMerged; ++q) of_slots[q][slot][lane] = of[q];
  __syncthreads();
  if (slot < kMerged) {
    double value = of_slots[slot][0][lane];
    for (int i = 1; i < kSlots; ++i) value = combined(slot, value, of_slots[slot][i][lane]);
    of_slots[slot][0][lane] = value;
  }
  __syncthreads();
  if (slot > 0 || !inside) return;
  const auto merged = [&](int q) { return of_slots[q][0][lane]; };
  const double s = merged(kSumS), g = merged(kSumG), d = merged(kSumD);
  const Statistics found(origin_s + s, origin_g + g, origin_d + d, merged(kSumSS) - s * s,
                         merged(kSumGG) - g * g, merged(kSumDD) - d * d, merged(kSumSG) - s * g,
                         merged(kSumSD) - s * d);
  MGHF_UNROLL_ALL
  for (int k = 0; k < kStatistics; ++k) {
    statistics[(b * kStatistics + k) * channels + channel] = found.of[k];
  }
  const bool finite_s = s - s == 0, finite_g = g - g == 0;
  const int64_t of_g = b * channels + channel, of_s = of_g + batch * channels;
  ranges.lows[of_g] = finite_g ? static_cast<float>(merged(kLowG)) : NAN;
  ranges.highs[of_g] = finite_g ? static_cast<float>(merged(kHighG)) : NAN;
  ranges.lows[of_s] = finite_s ? static_cast<float>(merged(kLowS)) : NAN;
  ranges.highs[of_s] = finite_s ? static_cast<float>(merged(kHighS)) : NAN;
}

}  // namespace

}  // namespace mghf::cuda
