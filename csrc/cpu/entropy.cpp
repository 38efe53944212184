// Histogram entropies of feature maps, on the CPU. See mghf_fast/reference/entropy.py.
//
// Method. A first pass finds each map's range, a second counts its bins. A step of the second takes
// kGroup contiguous values, of as many channels (channels_last) or of one map, and counts each in
// a table of its own: no two of them share a counter, so equal neighbours do not wait for each
// other. The bin is computed as in the reference, a division and a multiplication each rounded to
// float32, so every count equals the reference's. -sum p ln p is summed in float64.
//
// Floor. The two passes read the features once each (33.5 M values of 4 bytes at 128 x 512 x 512).
// A count takes two loads and a store, 0.75 cycles with four address units; 1.1 are measured on Zen
// 5, which hide the division: a product with the reciprocal, even an inexact one, gains nothing.

#include "arena.h"
#include "entropy.h"
#include "tiles.h"

namespace mghf {
namespace {

typedef uint32_t CountVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));

constexpr float kNaN = __builtin_nanf("");
constexpr int64_t kRunPixels = 4096;      // of one map, at a time
constexpr int64_t kSteps = 8;             // of counting, at a time
constexpr int64_t kMostTableBins = 4096;  // beyond, a map's values share one table

// More than the bins, because tables a power of two apart would compete for the same cache lines.
int64_t count_step(int64_t bins) { return round_up(bins, kGroup) + kGroup; }

int64_t padded_channels(int64_t channels) { return round_up(channels, kGroup); }

// ---- ranges ----

struct Range {
  Vec low = splat(__builtin_inff()), high = splat(-__builtin_inff()), bad = {};

  void add(Vec x) {
    low = min(low, x);
    high = max(high, x);
    bad += x * 0.0f;  // NaN once there was a NaN or an infinity
  }
};

inline void check_range(float bad, float* low, float* high) {
  const float range = *high - *low;
  if (bad != 0 || !(range - range == 0)) *low = *high = kNaN;
}

void map_range(const ImageView& view, int64_t b, int64_t channel, float* low, float* high,
               void* workspace) {
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(kRunPixels);
  Range parts[4];
  const int64_t pixels = v.height * v.width;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    const int64_t count = pixels - first < kRunPixels ? pixels - first : kRunPixels;
    const float* x = map_run(v, b, channel, first, count, buffer);
    int64_t p = 0;
    for (; p + 4 * kLanes <= count; p += 4 * kLanes) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < 4; ++k) parts[k].add(load(x + p + k * kLanes));
    }
    for (; p < count; ++p) parts[0].add(splat(x[p]));
  }
  for (int64_t k = 1; k < 4; ++k) {
    parts[0].low = min(parts[0].low, parts[k].low);
    parts[0].high = max(parts[0].high, parts[k].high);
    parts[0].bad += parts[k].bad;
  }
  *low = smallest(parts[0].low);
  *high = largest(parts[0].high);
  check_range(sum(parts[0].bad), low, high);
}

void run_range(const ImageView& view, int64_t b, int64_t first, int64_t pixels, float* low,
               float* high, void* workspace) {
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(tile_floats(v.channels));
  const int64_t padded = padded_channels(v.channels), tile = tile_pixels(v.channels);
  float* bad = arena.floats(padded);
  for (int64_t c = 0; c < padded; c += kLanes) {
    const Range none;
    store(low + c, none.low);
    store(high + c, none.high);
    store(bad + c, none.bad);
  }
  for (int64_t done = 0; done < pixels; done += tile) {
    const int64_t count = pixels - done < tile ? pixels - done : tile;
    const Rows rows = pixel_rows(v, b, first + done, count, buffer);
    for (int64_t c = 0; c < padded; c += kGroup) {
      Range parts[kGroupVectors];
      for (int64_t k = 0; k < kGroupVectors; ++k) {
        const int64_t at = c + k * kLanes;
        parts[k] = {load(low + at), load(high + at), load(bad + at)};
      }
      const float *x = rows.data + c, *next = rows.next + c * count;
      for (int64_t p = 0; p < count; ++p, x += rows.step, next += kGroup) {
        fetch(next);
#pragma GCC unroll 4
        for (int64_t k = 0; k < kGroupVectors; ++k) parts[k].add(load(x + k * kLanes));
      }
      for (int64_t k = 0; k < kGroupVectors; ++k) {
        const int64_t at = c + k * kLanes;
        store(low + at, parts[k].low);
        store(high + at, parts[k].high);
        store(bad + at, parts[k].bad);
      }
    }
  }
  for (int64_t c = 0; c < v.channels; ++c) check_range(bad[c], low + c, high + c);
}

// ---- counts ----

// What a step's kGroup values are counted with: bin = (x - low) / range * bins.
struct Bins {
  Vec low[kGroupVectors], range[kGroupVectors];
  CountVec table[kGroupVectors];  // where each value's counts begin
  Vec bins;
  CountVec last;

  // If lows and highs are not finite, every value still gets some valid bin.
  Bins(const float* low, const float* high, int64_t value_step, int64_t table_step, int64_t count) {
    bins = splat(static_cast<float>(count));
    last = CountVec{} + static_cast<uint32_t>(count - 1);
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t k = i / kLanes, lane = i % kLanes;
      this->low[k][lane] = low[i * value_step];
      range[k][lane] = high[i * value_step] - low[i * value_step];
      table[k][lane] = static_cast<uint32_t>(i * table_step);
    }
  }

  // kSteps steps, `step` floats apart: first the bins, then the counts, so that no bin is read
  // right after it was written (a quarter of the time).
  template <int64_t kSteps>
  void count(const float* x, int64_t step, uint32_t* counts) const {
    alignas(64) uint32_t index[kSteps * kGroup];
    for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < kGroupVectors; ++k) {
        const Vec position = (load(x + i * step + k * kLanes) - low[k]) / range[k] * bins;
        // As an unsigned number, a NaN's position is beyond the last bin too.
        const CountVec bin = reinterpret_cast<CountVec>(__builtin_convertvector(position, IntVec));
        *reinterpret_cast<CountVec*>(index + i * kGroup + k * kLanes) =
            (bin < last ? bin : last) + table[k];
      }
    }
    for (int64_t i = 0; i < kSteps * kGroup; i += kGroup) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < kGroup; ++k) ++counts[index[i + k]];
    }
  }
};

double entropy(const uint32_t* counts, int64_t runs, int64_t run_step, int64_t bins,
               int64_t pixels) {
  double total = 0;
  for (int64_t i = 0; i < bins; i += kLanes) {
    CountVec count = {};
    for (int64_t run = 0; run < runs; ++run) {
      count += *reinterpret_cast<const CountVec*>(counts + run * run_step + i);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (count[lane] == 0) continue;
      const double p = static_cast<double>(count[lane]) / static_cast<double>(pixels);
      total -= p * __builtin_log(p);
    }
  }
  return total / __builtin_log(static_cast<double>(bins));
}

double map_entropy(const ImageView& view, int64_t b, int64_t channel, float low, float high,
                   int64_t bins, void* workspace) {
  if (low != low) return static_cast<double>(kNaN);
  if (low == high) return 0;
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(kRunPixels);
  const int64_t tables = bins > kMostTableBins ? 1 : kGroup, step = count_step(bins);
  uint32_t* counts = reinterpret_cast<uint32_t*>(arena.floats(tables * step));
  __builtin_memset(counts, 0, static_cast<size_t>(tables * step) * sizeof(uint32_t));

  const Bins binning(&low, &high, 0, tables == 1 ? 0 : step, bins);
  const int64_t pixels = v.height * v.width;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    const int64_t count = pixels - first < kRunPixels ? pixels - first : kRunPixels;
    const float* x = map_run(v, b, channel, first, count, buffer);
    int64_t p = 0;
    for (; p + kSteps * kGroup <= count; p += kSteps * kGroup) {
      binning.count<kSteps>(x + p, kGroup, counts);
    }
    for (; p + kGroup <= count; p += kGroup) binning.count<1>(x + p, kGroup, counts);
    for (; p < count; ++p) {
      const float position = (x[p] - low) / (high - low) * static_cast<float>(bins);
      const int64_t bin = static_cast<int64_t>(position);
      ++counts[bin < bins - 1 ? bin : bins - 1];
    }
  }
  return entropy(counts, tables, step, bins, pixels);
}

void run_counts(const ImageView& view, int64_t b, int64_t first, int64_t pixels, const float* low,
                const float* high, int64_t bins, uint32_t* counts, void* workspace) {
  const ImageView v = merge_rows(view);
  Arena arena{static_cast<char*>(workspace)};
  float* buffer = arena.floats(tile_floats(v.channels));
  const int64_t padded = padded_channels(v.channels), tile = tile_pixels(v.channels);
  const int64_t step = count_step(bins);
  __builtin_memset(counts, 0, static_cast<size_t>(padded * step) * sizeof(uint32_t));
  for (int64_t done = 0; done < pixels; done += tile) {
    const int64_t count = pixels - done < tile ? pixels - done : tile;
    const Rows rows = pixel_rows(v, b, first + done, count, buffer);
    for (int64_t c = 0; c < padded; c += kGroup) {
      const Bins binning(low + c, high + c, 1, step, bins);
      const float *x = rows.data + c, *next = rows.next + c * count;
      int64_t p = 0;
      for (; p + kSteps <= count; p += kSteps) {
        for (int64_t i = 0; i < kSteps; ++i) fetch(next + (p + i) * kGroup);
        binning.count<kSteps>(x + p * rows.step, rows.step, counts + c * step);
      }
      for (; p < count; ++p) binning.count<1>(x + p * rows.step, rows.step, counts + c * step);
    }
  }
}

// ---- entry points ----

bool by_maps(const ImageView& view, int64_t bins) {
  return lies_by_maps(view) || bins > kMostTableBins;
}

size_t map_workspace_bytes(int64_t bins) {
  Arena arena{nullptr};
  arena.floats(kRunPixels);
  arena.floats((bins > kMostTableBins ? 1 : kGroup) * count_step(bins));
  return arena.used;
}

size_t run_workspace_bytes(const ImageView& view) {
  Arena arena{nullptr};
  arena.floats(tile_floats(view.channels));
  arena.floats(padded_channels(view.channels));
  return arena.used;
}

}  // namespace

const EntropyKernels MGHF_KERNELS = {by_maps,     map_workspace_bytes, run_workspace_bytes,
                                     map_range,   map_entropy,         padded_channels,
                                     count_step,  run_range,           run_counts,
                                     entropy};

}  // namespace mghf
