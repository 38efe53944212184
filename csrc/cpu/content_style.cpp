// MGHF-n and the content-style terms of a pair of feature stacks, on the CPU. See
// mghf_fast/reference/content_style.py for the mathematics and csrc/ops/content_style.cpp for the
// arithmetic between these steps; entropy.cpp counts the histograms between the first two.
//
// Method. The weights commute out of every term, so all sums are taken over unweighted features.
//   1. Moments of S, G and D = S - G: per run of pixels in float32, about the run's own pivot,
//      which removes large means, then merged in float64. D has moments of its own because those of
//      an almost equal pair would cancel: 1 - rho = (var D - (sd S - sd G)^2) / (2 sd S sd G).
//   2. Gram's difference over the kept maps: S S^T - G G^T is the symmetric part of
//      (S - G) (S + G)^T, which is one product instead of two and does not cancel either.
//   3. Gradient: an affine map of S and G per channel and one M x M product per pixel, in one sweep
//      with the moments and Gram's difference that the forward found.
//
// Floor, for C = 128, M = 64, 512 x 512: each step, the histograms too, reads S and G once, 256
// MiB; the third also writes 128 MiB; the products of the last two take 1.07 G multiply-adds each.
// Both products prefetch the next tile while they compute (overlap.h): a step then costs little
// more than the larger of its two floors.

#include "arena.h"
#include "content_style.h"
#include "overlap.h"
#include "tiles.h"

namespace mghf {
namespace {

constexpr int64_t kPartVectors = 64;   // of one map, summed in float32
constexpr int64_t kRunPixels = 4096;   // of one map, whose parts' sums are added
constexpr int64_t kRunRows = 1024;     // of all channels, whose tiles' sums are added
constexpr int64_t kPivotPixels = 8;    // whose mean is the pivot

int64_t padded(int64_t channels) { return round_up(channels, kGroup); }

// ---- moments ----

// Sums over a run of deviations from its pivots, and ranges, for kLanes neighbouring channels or
// pixels.
enum Sum { kS, kG, kD, kSS, kGG, kDD, kSG, kSD, kLowS, kHighS, kLowG, kHighG, kSums };
constexpr int64_t kFirstRange = kLowS;

struct Sums {
  Vec of[kSums];

  Sums() {
#pragma GCC unroll 16
    for (int64_t k = 0; k < kFirstRange; ++k) of[k] = Vec{};
    of[kLowS] = of[kLowG] = splat(__builtin_inff());
    of[kHighS] = of[kHighG] = splat(-__builtin_inff());
  }

  void add(Vec s, Vec g, Vec pivot_s, Vec pivot_g, Vec pivot_d) {
    const Vec s0 = s - pivot_s, g0 = g - pivot_g, d0 = (s - g) - pivot_d;
    of[kS] += s0;
    of[kG] += g0;
    of[kD] += d0;
    of[kSS] += s0 * s0;
    of[kGG] += g0 * g0;
    of[kDD] += d0 * d0;
    of[kSG] += s0 * g0;
    of[kSD] += s0 * d0;
    of[kLowS] = min(of[kLowS], s);
    of[kHighS] = max(of[kHighS], s);
    of[kLowG] = min(of[kLowG], g);
    of[kHighG] = max(of[kHighG], g);
  }

  void merge(const Sums& other) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < kFirstRange; ++k) of[k] += other.of[k];
    merge_ranges(other);
  }

  void merge_ranges(const Sums& other) {
    of[kLowS] = min(of[kLowS], other.of[kLowS]);
    of[kHighS] = max(of[kHighS], other.of[kHighS]);
    of[kLowG] = min(of[kLowG], other.of[kLowG]);
    of[kHighG] = max(of[kHighG], other.of[kHighG]);
  }
};

// Adds a run of `count` pixels with these sums to the moments of the `before` pixels before it.
template <class Number>
inline void merge(double* moments, int64_t step, const Number* sums, int64_t sum_step,
                  double pivot_s, double pivot_g, double pivot_d, double before, double count) {
  const auto mean = [&](Sum k) { return static_cast<double>(sums[k * sum_step]) / count; };
  const double s = mean(kS), g = mean(kG), d = mean(kD);
  const double share = count / (before + count), rest = before / (before + count);
  const double ds = pivot_s + s - moments[kMeanSr * step];
  const double dg = pivot_g + g - moments[kMeanGt * step];
  const double dd = pivot_d + d - moments[kMeanDifference * step];
  moments[kMeanSr * step] += ds * share;
  moments[kMeanGt * step] += dg * share;
  moments[kMeanDifference * step] += dd * share;
  const auto add = [&](Moment moment, Sum product, double means, double between) {
    double& old = moments[moment * step];
    old = rest * old + share * (mean(product) - means) + rest * share * between;
  };
  add(kSrSr, kSS, s * s, ds * ds);
  add(kGtGt, kGG, g * g, dg * dg);
  add(kDifferenceDifference, kDD, d * d, dd * dd);
  add(kSrGt, kSG, s * g, ds * dg);
  add(kSrDifference, kSD, s * d, ds * dd);
}

struct MapSpace {
  float *sr, *gt;

  explicit MapSpace(Arena& arena)
      : sr(arena.floats(kRunPixels)), gt(arena.floats(kRunPixels)) {}
};

void map_moments(const StylePair& pair, int64_t b, int64_t channel, double* moments,
                 void* workspace) {
  const ImageView gt = merge_rows(pair.gt), sr = merge_rows(pair.sr);
  Arena arena{static_cast<char*>(workspace)};
  const MapSpace space(arena);
  const int64_t pixels = sr.height * sr.width;
  for (int64_t k = 0; k < kMoments; ++k) moments[k] = 0;
  Sums ranges;
  for (int64_t first = 0; first < pixels; first += kRunPixels) {
    const int64_t count = least(kRunPixels, pixels - first);
    const float* s = map_run(sr, b, channel, first, count, space.sr);
    const float* g = map_run(gt, b, channel, first, count, space.gt);
    const int64_t sample = least(kPivotPixels, count);
    float pivot_s = 0, pivot_g = 0, pivot_d = 0;
    for (int64_t p = 0; p < sample; ++p) {
      pivot_s += s[p] - s[0];
      pivot_g += g[p] - g[0];
      pivot_d += (s[p] - g[p]) - (s[0] - g[0]);
    }
    pivot_s = s[0] + pivot_s / static_cast<float>(sample);
    pivot_g = g[0] + pivot_g / static_cast<float>(sample);
    pivot_d = (s[0] - g[0]) + pivot_d / static_cast<float>(sample);

    Sums sums, tail;  // every lane of the tail holds the same sum
    int64_t p = 0;
    while (p + kLanes <= count) {
      Sums part;
      const int64_t end = least(count, p + kPartVectors * kLanes);
      for (; p + kLanes <= end; p += kLanes) {
        part.add(load(s + p), load(g + p), splat(pivot_s), splat(pivot_g), splat(pivot_d));
      }
      sums.merge(part);
    }
    for (; p < count; ++p) {
      tail.add(splat(s[p]), splat(g[p]), splat(pivot_s), splat(pivot_g), splat(pivot_d));
    }
    double totals[kFirstRange];
    for (int64_t k = 0; k < kFirstRange; ++k) {
      totals[k] = static_cast<double>(tail.of[k][0]);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        totals[k] += static_cast<double>(sums.of[k][lane]);
      }
    }
    ranges.merge_ranges(sums);
    ranges.merge_ranges(tail);
    merge(moments, 1, totals, 1, static_cast<double>(pivot_s), static_cast<double>(pivot_g),
          static_cast<double>(pivot_d), static_cast<double>(first), static_cast<double>(count));
  }
  moments[kLowSr] = static_cast<double>(smallest(ranges.of[kLowS]));
  moments[kHighSr] = static_cast<double>(largest(ranges.of[kHighS]));
  moments[kLowGt] = static_cast<double>(smallest(ranges.of[kLowG]));
  moments[kHighGt] = static_cast<double>(largest(ranges.of[kHighG]));
}

struct RowSpace {
  int64_t channels, tile;
  float *sr, *gt;  // tiles
  float* sums;     // Sum by Sum, all channels
  float* pivots;   // of S, G, D

  RowSpace(const StylePair& pair, Arena& arena)
      : channels(padded(pair.sr.channels)), tile(tile_pixels(pair.sr.channels)) {
    sr = arena.floats(tile * channels);
    gt = arena.floats(tile * channels);
    sums = arena.floats(kSums * channels);
    pivots = arena.floats(3 * channels);
  }

  Vec& sum(int64_t k, int64_t c) const { return at(sums + k * channels + c); }
  Vec& pivot(int64_t k, int64_t c) const { return at(pivots + k * channels + c); }

  // Sets new pivots and clears the sums, for a run that begins with these pixels.
  void start(const Rows& s, const Rows& g, int64_t pixels) const {
    const int64_t sample = least(kPivotPixels, pixels);
    const float share = 1.0f / static_cast<float>(sample);
    for (int64_t c = 0; c < channels; c += kLanes) {
      for (int64_t k = 0; k < kFirstRange; ++k) sum(k, c) = Vec{};
      const Vec s0 = load(s.data + c), g0 = load(g.data + c);
      Vec s_sum = {}, g_sum = {}, d_sum = {};
      for (int64_t p = 1; p < sample; ++p) {
        const Vec s1 = load(s.data + p * s.step + c), g1 = load(g.data + p * g.step + c);
        s_sum += s1 - s0;
        g_sum += g1 - g0;
        d_sum += (s1 - g1) - (s0 - g0);
      }
      pivot(0, c) = s0 + s_sum * share;
      pivot(1, c) = g0 + g_sum * share;
      pivot(2, c) = (s0 - g0) + d_sum * share;
    }
  }

  void add(const Rows& s, const Rows& g, int64_t pixels) const {
    for (int64_t c = 0; c < channels; c += kLanes) {
      Sums t;
      const Vec pivot_s = pivot(0, c), pivot_g = pivot(1, c), pivot_d = pivot(2, c);
      const float *x = s.data + c, *y = g.data + c;
      const float *next_x = s.next + c * pixels, *next_y = g.next + c * pixels;
      for (int64_t p = 0; p < pixels; ++p, x += s.step, y += g.step) {
        fetch(next_x + p * kLanes);
        fetch(next_y + p * kLanes);
        t.add(load(x), load(y), pivot_s, pivot_g, pivot_d);
      }
      for (int64_t k = 0; k < kFirstRange; ++k) sum(k, c) += t.of[k];
      for (const Sum k : {kLowS, kLowG}) sum(k, c) = min(sum(k, c), t.of[k]);
      for (const Sum k : {kHighS, kHighG}) sum(k, c) = max(sum(k, c), t.of[k]);
    }
  }
};

void run_moments(const StylePair& pair, int64_t b, int64_t first, int64_t pixels, double* moments,
                 void* workspace) {
  const ImageView gt = merge_rows(pair.gt), sr = merge_rows(pair.sr);
  Arena arena{static_cast<char*>(workspace)};
  const RowSpace space(pair, arena);
  const int64_t channels = space.channels;
  const Sums none;
  for (int64_t k = 0; k < kMoments * channels; ++k) moments[k] = 0;
  for (int64_t k = kFirstRange; k < kSums; ++k) {
    for (int64_t c = 0; c < channels; c += kLanes) space.sum(k, c) = none.of[k];
  }
  for (int64_t done = 0; done < pixels;) {
    const int64_t run = least(kRunRows, pixels - done), before = done;
    for (int64_t p = 0; p < run; p += space.tile) {
      const int64_t count = least(space.tile, run - p);
      const Rows s = pixel_rows(sr, b, first + done, count, space.sr);
      const Rows g = pixel_rows(gt, b, first + done, count, space.gt);
      if (p == 0) space.start(s, g, count);
      space.add(s, g, count);
      done += count;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const auto pivot = [&](int64_t k) {
        return static_cast<double>(space.pivots[k * channels + c]);
      };
      merge(moments + c, channels, space.sums + c, channels, pivot(0), pivot(1), pivot(2),
            static_cast<double>(before), static_cast<double>(run));
    }
  }
  for (int64_t k = 0; k < kSums - kFirstRange; ++k) {
    for (int64_t c = 0; c < channels; ++c) {
      moments[(kLowSr + k) * channels + c] =
          static_cast<double>(space.sums[(kFirstRange + k) * channels + c]);
    }
  }
}

// ---- the kept channels of a pixel ----

inline Vec permute(Vec x, IntVec index) {
#if defined(__clang__)
  Vec result;
  for (int64_t i = 0; i < kLanes; ++i) result[i] = x[index[i]];
  return result;
#else
  return __builtin_shuffle(x, index);
#endif
}

// Which lanes of a vector of channels are kept.
struct Lanes {
  IntVec gather;   // the indices of the vector's kept lanes, consecutive
  IntVec scatter;  // the position of each kept lane among them
  IntVec mask;     // ones in the kept lanes
  int64_t start;   // number of channels kept before this vector
  int64_t count;
};

// The lanes of every vector of channels.
Lanes* plan_lanes(const KeptChannels& kept, int64_t channels, Arena& arena) {
  const int64_t vectors = channels / kLanes;
  constexpr int64_t kFloats = sizeof(Lanes) / sizeof(float);
  Lanes* plan = reinterpret_cast<Lanes*>(arena.floats(vectors * kFloats));
  if (arena.base == nullptr) return plan;
  for (int64_t n = 0, i = 0; n < vectors; ++n) {
    Lanes lanes = {};
    lanes.start = i;
    for (; i < kept.count && kept.index[i] < (n + 1) * kLanes; ++i) {
      const int64_t lane = kept.index[i] - n * kLanes;
      lanes.gather[lanes.count] = static_cast<int32_t>(lane);
      lanes.scatter[lane] = static_cast<int32_t>(lanes.count);
      lanes.mask[lane] = -1;
      ++lanes.count;
    }
    plan[n] = lanes;
  }
  return plan;
}

// Row length of kept channels; vectors are read and written beyond the last channel.
inline int64_t kept_step(int64_t kept) { return padded(kept) + kGroup; }

// ---- Gram's difference ----

// Scratch for (S - G) (S + G)^T over a tile of pixels.
struct ProductSpace {
  int64_t kept, width, step, tile;
  float *sr, *gt;     // of a map, or of a tile of all channels
  float* difference;  // S - G, by maps [kept][pixel], else [pixel][kept]
  float* sum;         // S + G, [pixel][kept]
  float* rows;        // S + G of kGroup maps
  float* total;       // the product, summed over some tiles
  Lanes* lanes = nullptr;

  ProductSpace(const StylePair& pair, const KeptChannels& channels, Arena& arena)
      : kept(channels.count), width(padded(kept)), step(kept_step(kept)) {
    const bool by_maps = lies_by_maps(pair.sr);
    tile = by_maps ? kMapPixels : kProductPixels;
    const int64_t all = padded(pair.sr.channels);
    sr = arena.floats(by_maps ? tile : tile * all);
    gt = arena.floats(by_maps ? tile : tile * all);
    difference = arena.floats(tile * step);
    sum = arena.floats(tile * step);
    total = arena.floats(kept * width);
    rows = arena.floats(by_maps ? kGroup * tile : 0);
    if (!by_maps) lanes = plan_lanes(channels, all, arena);
  }

  void load_maps(const ImageView& s, const ImageView& g, int64_t b, int64_t first, int64_t pixels,
                 const KeptChannels& channels) const {
    for (int64_t i = 0; i < kept; i += kGroup) {
      const int64_t maps = least(kGroup, kept - i);
      for (int64_t k = 0; k < maps; ++k) {
        const int64_t channel = channels.index[i + k];
        const float* x = map_run(s, b, channel, first, pixels, sr);
        const float* y = map_run(g, b, channel, first, pixels, gt);
        float *d = difference + (i + k) * tile, *e = rows + k * tile;
        for (int64_t p = 0; p < pixels; ++p) {
          d[p] = x[p] - y[p];
          e[p] = x[p] + y[p];
        }
      }
      read_pixels(rows, 1, tile, pixels, maps, sum + i, step);
    }
  }

  void load_rows(const Rows& s, const Rows& g, int64_t pixels, int64_t channels) const {
    for (int64_t p = 0; p < pixels; ++p) {
      const float *x = s.data + p * s.step, *y = g.data + p * g.step;
      for (int64_t n = 0; n < channels / kLanes; ++n) {
        const IntVec gather = lanes[n].gather;
        const Vec xs = permute(load(x + n * kLanes), gather);
        const Vec ys = permute(load(y + n * kLanes), gather);
        store(difference + p * step + lanes[n].start, xs - ys);
        store(sum + p * step + lanes[n].start, xs + ys);
      }
    }
  }
};

void run_product(const StylePair& pair, int64_t b, int64_t first, int64_t pixels,
                 const KeptChannels& kept, double* sums, void* workspace) {
  const ImageView gt = merge_rows(pair.gt), sr = merge_rows(pair.sr);
  const bool by_maps = lies_by_maps(sr);
  Arena arena{static_cast<char*>(workspace)};
  const ProductSpace space(pair, kept, arena);
  const int64_t m = kept.count, width = space.width, step = space.step;
  for (int64_t i = 0; i < m * width; ++i) {
    sums[i] = 0;
    space.total[i] = 0;
  }
  // Values read beyond the kept channels are never used, but must be initialised.
  for (int64_t i = 0; i < space.tile * step; ++i) space.sum[i] = 0;
  for (int64_t done = 0, summed = 0; done < pixels;) {
    const int64_t count = least(space.tile, pixels - done), next = first + done + count;
    Streams streams = {{sr, b, next, count, kept.index, m}, {gt, b, next, count, kept.index, m}};
    streams.spread(m, width / kLanes, count);
    if (by_maps) {
      space.load_maps(sr, gt, b, first + done, count, kept);
      for (int64_t p = 0; p < count; p += kProductPixels) {
        product<true>(space.difference + p, space.tile, 1, space.sum + p * step, step,
                      least(kProductPixels, count - p), m, width / kLanes, space.total, width,
                      streams);
      }
    } else {
      const Rows s = pixel_rows(sr, b, first + done, count, space.sr);
      const Rows g = pixel_rows(gt, b, first + done, count, space.gt);
      space.load_rows(s, g, count, padded(sr.channels));
      product<true>(space.difference, 1, step, space.sum, step, count, m, width / kLanes,
                    space.total, width, streams);
    }
    done += count;
    summed += count;
    if (summed >= kSumPixels || done == pixels) {
      move_sums(space.total, sums, m * width);
      summed = 0;
    }
  }
}

// ---- gradient ----

struct Weights {
  Vec difference, centred, mean, other, mean_other, like;

  Vec apply(Vec s, Vec g) const {
    const Vec d = s - g, x = like != 0 ? d : g;
    return difference * d + centred * (s - mean) + other * (x - mean_other);
  }
};

// Scratch of the gradient over a tile of pixels.
struct GradientSpace {
  int64_t kept, width, step, tile, channels;
  float *sr, *gt, *out;        // of a map, or of a tile of all channels
  float *features, *products;  // of the kept channels, by maps [kept][pixel], else [pixel][kept]
  Lanes* lanes = nullptr;

  GradientSpace(const StylePair& pair, const KeptChannels& selected, Arena& arena)
      : kept(selected.count),
        width(padded(kept)),
        step(kept_step(kept)),
        channels(padded(pair.sr.channels)) {
    const bool by_maps = lies_by_maps(pair.sr);
    tile = by_maps ? kMapPixels : kRowPixels;
    for (float** piece : {&sr, &gt, &out}) *piece = arena.floats(by_maps ? tile : tile * channels);
    for (float** piece : {&features, &products}) *piece = arena.floats(tile * step);
    if (!by_maps) lanes = plan_lanes(selected, channels, arena);
  }
};

inline Weights weights_of(const float* coefficients, int64_t channels, int64_t c, bool one) {
  const auto of = [&](Coefficient k) {
    const float* p = coefficients + k * channels + c;
    return one ? splat(*p) : at(p);
  };
  return {of(kOfDifference), of(kOfCentred),   of(kMeanOfCentred),
          of(kOfOther),      of(kMeanOfOther), of(kLike)};
}

void gradient_of_maps(const GradientSpace& space, const ImageView& gt, const ImageView& sr,
                      const MutableImageView& grad, int64_t b, int64_t first, int64_t count,
                      const KeptChannels& kept, const float* coefficients, const float* matrix) {
  const int64_t m = kept.count, tile = space.tile;
  for (int64_t i = 0; i < m; ++i) {
    float* row = space.features + i * tile;
    const float* s = map_run(sr, b, kept.index[i], first, count, row);
    if (s != row) __builtin_memcpy(row, s, static_cast<size_t>(count) * sizeof(float));
    for (int64_t p = count; p < round_up(count, kLanes); ++p) row[p] = 0;
  }
  const int64_t next = first + count;
  Streams streams = {{sr, b, next, count}, {gt, b, next, count}};
  streams.spread(m, round_up(count, kLanes) / kLanes, m);
  product<false>(matrix, 1, space.width, space.features, tile, m, m,
                 round_up(count, kLanes) / kLanes, space.products, tile, streams);
  const bool in_place =
      grad.kind == ScalarKind::float32 && grad.column_stride == 1 && grad.height == 1;
  for (int64_t c = 0, i = 0; c < sr.channels; ++c) {
    const float* s = map_run(sr, b, c, first, count, space.sr);
    const float* g = map_run(gt, b, c, first, count, space.gt);
    const Weights weights = weights_of(coefficients, space.channels, c, true);
    const bool is_kept = i < m && kept.index[i] == c;
    const float* product_row = space.products + i * tile;
    float* target = space.out;
    if (in_place) {
      target = static_cast<float*>(grad.data) + b * grad.batch_stride + c * grad.channel_stride +
               first;
    }
    const bool past_cache = in_place && passes_cache(grad, target);
    int64_t p = 0;
    for (; p + kLanes <= count; p += kLanes) {
      Vec value = weights.apply(load(s + p), load(g + p));
      if (is_kept) value += at(product_row + p);
      past_cache ? store_past_cache(target + p, value) : store(target + p, value);
    }
    for (; p < count; ++p) {
      const float value = weights.apply(splat(s[p]), splat(g[p]))[0];
      target[p] = is_kept ? value + product_row[p] : value;
    }
    if (!in_place) {
      for_each_run(grad, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
        write_pixels(grad, b, y, x, pixels, c, 1, target + done, 1);
      });
    }
    i += is_kept;
  }
}

void gradient_of_rows(const GradientSpace& space, const ImageView& gt, const ImageView& sr,
                      const MutableImageView& grad, int64_t b, int64_t first, int64_t count,
                      const KeptChannels& kept, const float* coefficients, const float* matrix) {
  const int64_t m = kept.count, step = space.step, vectors = space.channels / kLanes;
  const Rows s = pixel_rows(sr, b, first, count, space.sr);
  const Rows g = pixel_rows(gt, b, first, count, space.gt);
  for (int64_t n = 0; n < vectors; ++n) {
    const Lanes& lanes = space.lanes[n];
    if (lanes.count == 0) continue;
    const IntVec gather = lanes.gather;
    for (int64_t p = 0; p < count; ++p) {
      store(space.features + p * step + lanes.start,
            permute(load(s.data + p * s.step + n * kLanes), gather));
    }
  }
  const int64_t next = first + count;
  Streams streams = {{sr, b, next, count}, {gt, b, next, count}};
  streams.spread(count, space.width / kLanes, m);
  product<false>(space.features, step, 1, matrix, space.width, m, count, space.width / kLanes,
                 space.products, step, streams);

  const bool in_place = pixels_in_place(grad);
  float* target = space.out;
  int64_t target_step = space.channels;
  if (in_place) {
    target = static_cast<float*>(grad.data) + b * grad.batch_stride + first * grad.column_stride;
    target_step = grad.column_stride;
  }
  const bool past_cache =
      in_place && passes_cache(grad, target) && target_step % kLanes == 0;
  for (int64_t n = 0; n < vectors; ++n) {
    const IntVec scatter = space.lanes[n].scatter, mask = space.lanes[n].mask;
    const Weights weights = weights_of(coefficients, space.channels, n * kLanes, false);
    const float *x = s.data + n * kLanes, *y = g.data + n * kLanes;
    const float* of_product = space.products + space.lanes[n].start;
    float* out = target + n * kLanes;
    for (int64_t p = 0; p < count; ++p) {
      const IntVec of_kept = reinterpret_cast<IntVec>(permute(load(of_product), scatter)) & mask;
      const Vec value = weights.apply(load(x), load(y)) + reinterpret_cast<Vec>(of_kept);
      past_cache ? store_past_cache(out, value) : store(out, value);
      x += s.step;
      y += g.step;
      of_product += step;
      out += target_step;
    }
  }
  if (!in_place) {
    for_each_run(grad, first, count, [&](int64_t y, int64_t x, int64_t pixels, int64_t done) {
      write_pixels(grad, b, y, x, pixels, 0, grad.channels, target + done * target_step,
                   target_step);
    });
  }
}

void run_gradient(const StylePair& pair, const MutableImageView& grad_view, int64_t b,
                  int64_t first, int64_t pixels, const KeptChannels& kept,
                  const float* coefficients, const float* matrix, void* workspace) {
  const ImageView gt = merge_rows(pair.gt), sr = merge_rows(pair.sr);
  const MutableImageView grad = merge_rows(grad_view);
  Arena arena{static_cast<char*>(workspace)};
  const GradientSpace space(pair, kept, arena);
  // Values read beyond the kept channels are masked, but must be initialised.
  for (int64_t i = 0; i < space.tile * space.step; ++i) space.products[i] = 0;
  const auto gradient = lies_by_maps(sr) ? gradient_of_maps : gradient_of_rows;
  for (int64_t done = 0; done < pixels; done += space.tile) {
    gradient(space, gt, sr, grad, b, first + done, least(space.tile, pixels - done), kept,
             coefficients, matrix);
  }
  finish_stores();
}

// ---- entry points ----

bool by_maps(const StylePair& pair) { return lies_by_maps(pair.sr); }

template <class Space, class... Arguments>
inline size_t bytes(const Arguments&... arguments) {
  Arena arena{nullptr};
  Space(arguments..., arena);
  return arena.used;
}

size_t workspace_bytes(const StylePair& pair, int64_t kept_count) {
  const KeptChannels kept = {nullptr, kept_count};
  const size_t moments = by_maps(pair) ? bytes<MapSpace>() : bytes<RowSpace>(pair);
  const size_t product = bytes<ProductSpace>(pair, kept);
  const size_t gradient = bytes<GradientSpace>(pair, kept);
  const size_t more = moments > product ? moments : product;
  return more > gradient ? more : gradient;
}

}  // namespace

const ContentStyleKernels MGHF_KERNELS = {padded,      workspace_bytes, by_maps,     map_moments,
                                          run_moments, run_product,     run_gradient};

}  // namespace mghf
