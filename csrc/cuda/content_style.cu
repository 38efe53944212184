// MGHF-n and the content-style terms of a pair of feature stacks, S and G, with D = S - G.
//
// The weights commute out of every term, so all sums are over unweighted features. The forward
// reads the pair in three sweeps:
//
//   moments_of_runs      moments of S, G and D per run of pixels, about the run's own pivots, which
//                        take large means out, and ranges. D has moments of its own because those
//                        of a pair that is almost equal would cancel:
//                        1 - rho = (var D - (sd S - sd G)^2) / (2 sd S sd G)
//   count (histograms.h) histograms of G and of S
//   products_of_runs     over the kept maps (maps_product.h): S S^T - G G^T is the symmetric part
//                        of (S - G) (S + G)^T, one product instead of two, without cancellation
//
// with small kernels between them, whose work is some KB or MB and mostly latency: merge_runs
// (float64 statistics of each map), entropies_of_counts, select (the kept maps, by rank, and three
// of the terms), sums_of_products, gram_difference. Eight launches.
//
// The backward prepares coefficients (prepare, fragments_of_style) and reads the pair once:
//
//   grad = naive D + [kept] (a D + centred (S - mean S) + other (X - mean X) + K S_kept)
//
// X being D for maps that are much alike, else G: with the other of the two the terms would nearly
// cancel. Three launches.
//
// Floors for B = 1, C = 128, M = 64, 512 x 512, float32, at 4.3 TB/s: the moments and the
// histograms read 268 MB each, 62 us each (counting 67 M numbers in shared memory takes about as
// long), the products 134 MB, 31 us (268 MB where a pixel's channels lie side by side; their 3.2 G
// multiply-adds of TF32 take 21 us at 300 TFLOP/s), the small kernels some 20 us: 175 us. The
// backward reads 268 MB and writes 134, 94 us, behind which its 3.2 G multiply-adds hide. Halves:
// half the bytes, the same arithmetic.
#include "content_style.h"

#include "maps_gradient.h"

namespace mghf::cuda {

namespace {

constexpr double kVarianceFloor = 1e-8;

int64_t blocks_for(int64_t number, int64_t of_block) { return (number + of_block - 1) / of_block; }

// Pieces of a workspace, one after the other; of a null one, their size.
class Pieces {
 public:
  explicit Pieces(void* workspace) : at_(static_cast<char*>(workspace)) {}

  template <class X>
  X* take(int64_t number) {
    char* const piece = at_ == nullptr ? nullptr : at_ + bytes_;
    bytes_ += blocks_for(number * static_cast<int64_t>(sizeof(X)), 16) * 16;
    return reinterpret_cast<X*>(piece);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* at_;
  int64_t bytes_ = 0;
};

// ---- moments ----

// Rows of a run's results: sums of what deviates from the pivots, ranges, the pivots.
enum Partial {
  kSumS, kSumG, kSumD, kSumSS, kSumGG, kSumDD, kSumSG, kSumSD,
  kLowS, kLowG, kHighS, kHighG,
  kPivotS, kPivotG, kPivotD,
  kPartials,
};
constexpr int kSums = kLowS;        // so many of them are added up
constexpr int kMerged = kPivotS;    // of so many every thread has one

// Rows of a map's statistics, the first of which go to the backward: its gradient of the
// correlation is, per pixel and times -n,
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

// How often a loop that reads is unrolled, so that several loads are under way.
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

// Means of some pixels: anchored at one of them, so that a constant map deviates by exactly 0.
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

// A block takes a run of one map (kByMaps), or of 32 maps, a lane of each warp one.
template <class T, Reading kReading, bool kByMaps>
__global__ void __launch_bounds__(kSweepThreads)
    moments_of_runs(Image<T> gt, Image<T> sr, float* partial, Runs runs) {
  __shared__ float of_threads[kMerged][kSweepWarps][kWarp];
  constexpr int kStep = pixels_of(kReading);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, row = thread / kWarp;
  const Place place(blockIdx.x, runs.number, sr.channels, kByMaps ? 1 : kWarp);
  const int64_t channel = place.channel + (kByMaps ? 0 : lane);
  const bool inside = channel < sr.channels;
  float of[kMerged] = {0, 0, 0, 0, 0, 0, 0, 0, INFINITY, INFINITY, -INFINITY, -INFINITY};
  Pivots pivots;
  if (inside) {
    const T *const s_map = sr.map(place.b, channel), *const g_map = gt.map(place.b, channel);
    const int64_t begin = runs.begin(place.run), end = runs.end(place.run, sr.pixels());
    pivots = pivots_of<T, kReading != Reading::strided>(gt, g_map, sr, s_map, begin, end);
    MGHF_UNROLL(kAtOnce<kReading>)
    for (int64_t p = begin + (kByMaps ? thread * kStep : row); p < end;
         p += (kByMaps ? kSweepThreads : kSweepWarps) * kStep) {
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

// The statistics of a map from its means and mean products of what deviates from them.
struct Statistics {
  double of[kStatistics];

  __device__ Statistics(double s, double g, double d, double ss, double gg, double dd, double sg,
                        double sd) {
    ss = ss < 0 ? 0 : ss;  // by rounding
    gg = gg < 0 ? 0 : gg;
    const bool floored_s = ss <= kVarianceFloor, floored_g = gg <= kVarianceFloor;
    const double root =
        sqrt(floored_s ? kVarianceFloor : ss) * sqrt(floored_g ? kVarianceFloor : gg);
    // Of a pair that is alike: from the moments of D, as the others would cancel.
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

// Statistics of each map from those of its runs, in float64, about the first run's pivots. Ranges
// are NaN for a map with a NaN or an infinity, which its mean shows. Also clears the counts.
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

// ---- selection ----

constexpr int kSelectThreads = 256;

// The kept maps of an image, ascending: which channels they are, and which ranks they have.
struct Ascending {
  int *channels, *ranks;  // (B, M)
};

// From the rank of each of an image's channels, which is kept if it is less than `maps`. Calls
// `found(channel, place)` with the number of kept channels before each channel.
template <class Found>
__device__ void sort_kept(const int* ranks, int64_t channels, int64_t maps, int* counts_of_threads,
                          const Found& found) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t share = (channels + kSelectThreads - 1) / kSelectThreads;
  const int64_t begin = thread * share;
  const int64_t end = begin + share < channels ? begin + share : channels;
  int count = 0;
  MGHF_UNROLL(1)
  for (int64_t c = begin; c < end; ++c) count += ranks[c] < maps;
  counts_of_threads[thread] = count;
  __syncthreads();
  int place = 0;
  MGHF_UNROLL(4)
  for (int i = 0; i < thread; ++i) place += counts_of_threads[i];
  MGHF_UNROLL(1)
  for (int64_t c = begin; c < end; ++c) {
    found(c, place);
    place += ranks[c] < maps;
  }
}

// Which maps are kept, most important first: compared in float32, ties to the lower channel, a NaN
// above all; their weights and moments, and the terms that need no product. A block an image; a
// map's rank is the number of maps before it.
__global__ void __launch_bounds__(kSelectThreads)
    select(const double* entropies, const double* statistics, float* compared,
           int* ranks, Ascending ascending, int* places, StyleResults results,
           StyleOptions options, int64_t batch, int64_t channels) {
  __shared__ double sums[3][kSelectThreads];
  __shared__ int counts[kSelectThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x, maps = options.top_m;
  const auto importance = [&](int64_t c) {
    return 1 - (entropies[b * channels + c] + entropies[(batch + b) * channels + c]) / 2;
  };
  compared += b * channels;
  ranks += b * channels;
  if (maps > 0) {
    for (int64_t c = thread; c < channels; c += kSelectThreads) {
      const auto rounded = static_cast<float>(importance(c));
      compared[c] = rounded == rounded ? rounded : INFINITY;
    }
    __syncthreads();
  }
  const double* const of_map = statistics + b * kStatistics * channels;
  double squares = 0, weighted = 0, distance = 0;
  for (int64_t c = thread; c < channels; c += kSelectThreads) {
    const double square = of_map[kSquare * channels + c];
    squares += square;
    if (maps == 0) continue;
    const float mine = compared[c];
    int rank = 0;
    MGHF_UNROLL(4)
    for (int other = 0; other < static_cast<int>(channels); ++other) {
      const float theirs = compared[other];
      rank += theirs > mine || (theirs == mine && other < c);
    }
    ranks[c] = rank;
    if (rank >= maps) continue;
    const double weight = pow(1 + options.alpha * importance(c), options.gamma);
    results.kept[b * maps + rank] = c;
    results.weights[b * maps + rank] = static_cast<float>(weight);
    for (int k = 0; k < kStyleMoments; ++k) {
      results.moments[(b * kStyleMoments + k) * maps + rank] =
          static_cast<float>(of_map[k * channels + c]);
    }
    weighted += weight * weight * square;
    distance += of_map[kDistance * channels + c];
  }
  sums[0][thread] = squares;
  sums[1][thread] = weighted;
  sums[2][thread] = distance;
  for (int half = kSelectThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      for (auto& sum : sums) sum[thread] += sum[thread + half];
    }
  }
  if (thread == 0) {
    const auto m = static_cast<double>(maps > 0 ? maps : 1);
    results.naive[b] = static_cast<float>(sums[0][0] / static_cast<double>(channels));
    results.mse[b] = static_cast<float>(sums[1][0] / m);
    results.correlation[b] = static_cast<float>(sums[2][0] / m);
    if (maps == 0) results.gram[b] = 0;
  }
  if (maps == 0) return;
  sort_kept(ranks, channels, maps, counts, [&](int64_t c, int place) {
    if (ranks[c] >= maps) return;
    ascending.channels[b * maps + place] = static_cast<int>(c);
    places[b * maps + ranks[c]] = place;
  });
}

// ---- Gram's difference ----

constexpr int kDifferenceThreads = 512;

// difference_ij = w_i w_j (P_ij + P_ji) / (2 M n) and sum difference^2 / M, a block an image.
__global__ void __launch_bounds__(kDifferenceThreads)
    gram_difference(const double* totals, const int* places, const float* weights,
                    float* difference, float* gram, int64_t maps, int64_t pixels) {
  __shared__ double squares[kDifferenceThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x;
  totals += product_totals(b, maps, true);
  places += b * maps;
  weights += b * maps;
  const double share = 1 / (2 * static_cast<double>(maps) * static_cast<double>(pixels));
  double square = 0;
  MGHF_UNROLL(4)
  for (int64_t k = thread; k < maps * maps; k += kDifferenceThreads) {
    const int64_t i = k / maps, j = k % maps;
    const double sum = totals[place_of_total(maps, true, places[i], places[j])] +
                       totals[place_of_total(maps, true, places[j], places[i])];
    const double weight = static_cast<double>(weights[i]) * static_cast<double>(weights[j]);
    const double value = weight * sum * share;
    difference[b * maps * maps + k] = static_cast<float>(value);
    square += value * value;
  }
  squares[thread] = square;
  for (int half = kDifferenceThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) squares[thread] += squares[thread + half];
  }
  if (thread == 0) gram[b] = static_cast<float>(squares[0] / static_cast<double>(maps));
}

// ---- the forward's launches ----

struct ForwardSpace {
  Pieces pieces;
  float* partial = nullptr;
  double* statistics = nullptr;
  PairRanges ranges{};
  int* counts = nullptr;
  int64_t number_of_counts = 0;
  double* entropies = nullptr;
  float* compared = nullptr;
  int* ranks = nullptr;
  Ascending ascending{};
  int* places = nullptr;
  float* products = nullptr;
  double* totals = nullptr;

  template <class T>
  ForwardSpace(const Image<T>& sr, const StyleOptions& options, void* workspace)
      : pieces(workspace) {
    const int64_t maps = sr.batch * sr.channels, kept = sr.batch * options.top_m;
    const int64_t runs = runs_of_moments(sr.pixels(), sr.by_maps()).number;
    partial = pieces.take<float>(maps * runs * kPartials);
    statistics = pieces.take<double>(maps * kStatistics);
    ranges.lows = pieces.take<float>(2 * maps);
    ranges.highs = pieces.take<float>(2 * maps);
    if (options.top_m == 0) return;
    number_of_counts = 2 * Counts::number(sr.batch, sr.channels, options.bins, false);
    counts = pieces.take<int>(number_of_counts);
    entropies = pieces.take<double>(2 * maps);
    compared = pieces.take<float>(maps);
    ranks = pieces.take<int>(maps);
    ascending = {pieces.take<int>(kept), nullptr};
    places = pieces.take<int>(kept);
    const int64_t elements = product_totals(sr.batch, options.top_m, true);
    products = pieces.take<float>(elements * product_runs(sr.pixels(), options.top_m, true).number);
    totals = pieces.take<double>(elements);
  }
};

// Of both images, first G's; those of one layout as if they were of one batch.
template <Reading kReading, class T>
const char* entropies(const Image<T>& gt, const Image<T>& sr, const ForwardSpace& space, int bins,
                      Stream stream) {
  const int64_t maps = sr.batch * sr.channels, pixels = sr.pixels();
  const int64_t counts_of_gt = Counts::number(gt.batch, gt.channels, bins, gt.by_maps());
  const Counts of_gt{space.counts, bins, gt.by_maps()};
  const Counts of_sr{space.counts + counts_of_gt, bins, sr.by_maps()};
  const auto ranges = [&](int64_t first) {
    return Ranges{space.ranges.lows + first, space.ranges.highs + first, 1};
  };
  const auto launch_entropies = [&](const Counts& counts, int64_t first, int64_t number) {
    return entropies_of_counts(counts, ranges(first), space.entropies + first, number, sr.channels,
                               pixels, stream);
  };
  const Histograms<T> g{gt, ranges(0), of_gt}, s{sr, ranges(maps), of_sr};
  const char* error = nullptr;
  if (of_gt.by_maps == of_sr.by_maps) {
    const Runs runs = runs_of_counts(pixels, of_gt.by_maps);
    error = count<kReading>(Counted<T>{g, s, 2}, runs, stream);
    return error != nullptr ? error : launch_entropies(of_gt, 0, 2 * maps);
  }
  for (const Histograms<T>* one : {&g, &s}) {
    const Runs runs = runs_of_counts(pixels, one->counts.by_maps);
    error = count<kReading>(Counted<T>{*one, *one, 1}, runs, stream);
    if (error != nullptr) return error;
    error = launch_entropies(one->counts, one == &g ? 0 : maps, maps);
    if (error != nullptr) return error;
  }
  return nullptr;
}

template <Reading kReading, class T>
const char* forward(const Image<T>& gt, const Image<T>& sr, const StyleOptions& options,
                    const StyleResults& results, void* workspace, Stream stream) {
  const ForwardSpace space(sr, options, workspace);
  const int64_t channels = sr.channels, pixels = sr.pixels(), maps = options.top_m;
  const Runs runs = runs_of_moments(pixels, sr.by_maps());
  const char* error = nullptr;
  if (sr.by_maps()) {
    error = launch(moments_of_runs<T, kReading, true>,
                   {sr.batch * channels * runs.number, kSweepThreads}, stream, gt, sr,
                   space.partial, runs);
  } else if constexpr (pixels_of(kReading) == 1) {
    error = launch(moments_of_runs<T, kReading, false>,
                   {sr.batch * blocks_for(channels, kWarp) * runs.number, kSweepThreads}, stream,
                   gt, sr, space.partial, runs);
  }
  if (error != nullptr) return error;
  error = launch(merge_runs, {sr.batch * blocks_for(channels, kChannelsOfMerge), kSweepThreads},
                 stream, space.partial, space.statistics, space.ranges, space.counts,
                 space.number_of_counts, sr.batch, channels, pixels, runs);
  if (error != nullptr) return error;
  if (maps > 0) {
    error = entropies<kReading>(gt, sr, space, static_cast<int>(options.bins), stream);
    if (error != nullptr) return error;
  }
  error = launch(select, {sr.batch, kSelectThreads}, stream, space.entropies, space.statistics,
                 space.compared, space.ranks, space.ascending, space.places, results, options,
                 sr.batch, channels);
  if (error != nullptr || maps == 0) return error;
  error = products<true, kReading>(gt, sr, space.ascending.channels, maps, space.products,
                                   space.totals, stream);
  if (error != nullptr) return error;
  return launch(gram_difference, {sr.batch, kDifferenceThreads}, stream, space.totals,
                space.places, results.weights, results.difference, results.gram, maps, pixels);
}

// ---- the backward's coefficients ----

// What the gradient of a map is made of; how many kept maps are before it if it is kept, else -1.
struct StyleTerm {
  float4 terms;  // naive, of_difference, of_centred, mean_of_centred
  float4 other;  // of_other, mean_of_other, alike, place, as bits

  __device__ int place() const { return bits_as<int>(other.w); }
  __device__ float gradient(float s, float g, float product) const {
    const float d = s - g, naive = terms.x * d;
    // Selected and not multiplied: in a map that is not kept nothing spreads from another's NaN.
    if (place() < 0) return naive;
    const float x = other.z != 0 ? d : g;
    return naive + (product + terms.y * d + terms.z * (s - terms.w) + other.x * (x - other.y));
  }
};

template <class T>
struct StyleTerms {
  static constexpr bool kReadsPair = true;
  Image<T> gt;
  const int *channels, *starts;  // of the kept maps, ascending; of each group
  const StyleTerm* terms;
  int maps;

  __device__ int kept(int64_t b, int i) const { return channels[b * maps + i]; }
  __device__ int kept_before(int64_t b, int group) const {
    return maps > 0 ? starts[b * (groups_of(gt.channels) + 1) + group] : 0;
  }
  __device__ StyleTerm of(int64_t b, int channel) const { return terms[b * gt.channels + channel]; }
};

// The kept maps in ascending order, a block an image.
__global__ void __launch_bounds__(kSelectThreads)
    prepare(const int64_t* kept, int* ranks, Ascending ascending, int* places, int* starts,
            int64_t channels, int64_t maps) {
  __shared__ int counts[kSelectThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t b = blockIdx.x, groups = groups_of(channels);
  ranks += b * channels;
  for (int64_t c = thread; c < channels; c += kSelectThreads) ranks[c] = static_cast<int>(maps);
  __syncthreads();
  for (int64_t i = thread; i < maps; i += kSelectThreads) {
    const int64_t c = kept[b * maps + i];
    if (c >= 0 && c < channels) ranks[c] = static_cast<int>(i);
  }
  __syncthreads();
  sort_kept(ranks, channels, maps, counts, [&](int64_t c, int place) {
    const bool is_kept = ranks[c] < maps;
    places[b * channels + c] = is_kept ? place : -1;
    if (is_kept) {
      ascending.channels[b * maps + place] = static_cast<int>(c);
      ascending.ranks[b * maps + place] = ranks[c];
    }
    if (c % kGroup == 0) starts[b * (groups + 1) + c / kGroup] = place;
    if (c == channels - 1) starts[b * (groups + 1) + groups] = place + is_kept;
  });
}

// Gram's part of the gradient is K S_kept with K_ij = (4 grad / (M^2 n)) w_i w_j D_ij. A block
// takes 16 of the rows of a group's kept maps; the first of them also the group's terms.
__global__ void __launch_bounds__(kGradientThreads)
    fragments_of_style(StyleGradients grads, StyleStatistics statistics, Ascending ascending,
                       const int* places, const int* starts, StyleTerm* terms, uint4* fragments,
                       int64_t channels, int64_t pixels) {
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t maps = statistics.top_m, groups = groups_of(channels);
  const int64_t tile = blockIdx.x % kRowTiles, group = blockIdx.x / kRowTiles % groups;
  const int64_t b = blockIdx.x / kRowTiles / groups;
  const auto grad = [&](int term) {
    return static_cast<double>(grads.data[term][b * grads.strides[term]]);
  };
  const auto m = static_cast<double>(maps > 0 ? maps : 1), n = static_cast<double>(pixels);
  const int64_t c = group * kGroup + thread;
  if (tile == 0 && thread < kGroup && c < channels) {
    const int place = maps > 0 ? places[b * channels + c] : -1;
    StyleTerm found{};
    found.terms.x = static_cast<float>(2 * grad(0) / (static_cast<double>(channels) * n));
    found.other.w = bits_as<float>(place);
    if (place >= 0) {
      const int64_t i = ascending.ranks[b * maps + place];
      const auto row = [&](int r) {
        return static_cast<double>(statistics.moments[(b * kStyleMoments + r) * maps + i]);
      };
      const double weight = statistics.weights[b * maps + i];
      const double correlation = grad(2) / (m * n);
      const bool alike = 2 * fabs(row(kExcess)) < row(kScale);
      found.terms.y = static_cast<float>(2 * grad(1) / (m * n) * weight * weight);
      found.terms.z = static_cast<float>(correlation * (alike ? -row(kExcess) : row(kSlope)));
      found.terms.w = static_cast<float>(row(kMeanS));
      found.other.x = static_cast<float>(correlation * (alike ? row(kScale) : -row(kScale)));
      found.other.y = static_cast<float>(alike ? row(kMeanD) : row(kMeanG));
      found.other.z = alike ? 1.0f : 0.0f;
    }
    terms[b * channels + c] = found;
  }
  if (maps == 0) return;
  const int* const start = starts + b * (groups + 1) + group;
  const int first = start[0] + static_cast<int>(tile) * 16, rows = start[1] - first;
  if (rows <= 0) return;
  const int* const ranks = ascending.ranks + b * maps;
  const float* const weights = statistics.weights + b * maps;
  const double gram = 4 * grad(3) / (m * m * n);
  write_fragments(
      fragments + ((b * groups + group) * kRowTiles + tile) * depths_of(maps) * kWarp * 2, rows,
      static_cast<int>(maps), [&](int row, int column) {
        const int64_t i = ranks[first + row], j = ranks[column];
        return static_cast<float>(
            gram * static_cast<double>(weights[i]) * static_cast<double>(weights[j]) *
            static_cast<double>(statistics.difference[(b * maps + i) * maps + j]));
      });
}

struct BackwardSpace {
  Pieces pieces;
  int* ranks;
  Ascending ascending;
  int *places, *starts;
  StyleTerm* terms;
  uint4* fragments;

  template <class T>
  BackwardSpace(const Image<T>& sr, int64_t top_m, void* workspace) : pieces(workspace) {
    const int64_t maps = sr.batch * sr.channels, groups = groups_of(sr.channels);
    terms = pieces.take<StyleTerm>(maps);
    ranks = pieces.take<int>(maps);
    places = pieces.take<int>(maps);
    starts = pieces.take<int>(sr.batch * (groups + 1));
    ascending = {pieces.take<int>(sr.batch * top_m), pieces.take<int>(sr.batch * top_m)};
    fragments = pieces.take<uint4>(number_of_fragments(sr.batch, sr.channels, top_m));
  }
};

template <Reading kReading, class T>
const char* backward(const StyleGradients& grads, const Image<T>& gt, const Image<T>& sr,
                     const StyleStatistics& statistics, const MutableImage<T>& grad_sr,
                     void* workspace, Stream stream) {
  const int64_t maps = statistics.top_m, groups = groups_of(sr.channels);
  const BackwardSpace space(sr, maps, workspace);
  const char* error = nullptr;
  if (maps > 0) {
    error = launch(prepare, {sr.batch, kSelectThreads}, stream, statistics.kept, space.ranks,
                   space.ascending, space.places, space.starts, sr.channels, maps);
    if (error != nullptr) return error;
  }
  error = launch(fragments_of_style, {sr.batch * groups * kRowTiles, kGradientThreads}, stream,
                 grads, statistics, space.ascending, space.places, space.starts, space.terms,
                 space.fragments, sr.channels, sr.pixels());
  if (error != nullptr) return error;
  const StyleTerms<T> terms{gt, space.ascending.channels, space.starts, space.terms,
                            static_cast<int>(maps)};
  return write_gradient<kReading>(sr, grad_sr, space.fragments, terms, maps, stream);
}

}  // namespace

template <class T>
int64_t content_style_workspace_bytes(const Image<T>& sr, const StyleOptions& options) {
  return ForwardSpace(sr, options, nullptr).pieces.bytes();
}

template <class T>
int64_t content_style_backward_workspace_bytes(const Image<T>& sr, int64_t top_m) {
  return BackwardSpace(sr, top_m, nullptr).pieces.bytes();
}

template <class T>
const char* content_style(const Image<T>& gt, const Image<T>& sr, const StyleOptions& options,
                          const StyleResults& results, void* workspace, Stream stream) {
  if (gt.by_fours() && sr.by_fours()) {
    return forward<Reading::fours>(gt, sr, options, results, workspace, stream);
  }
  return gt.flat() && sr.flat()
             ? forward<Reading::flat>(gt, sr, options, results, workspace, stream)
             : forward<Reading::strided>(gt, sr, options, results, workspace, stream);
}

template <class T>
const char* content_style_backward(const StyleGradients& grads, const Image<T>& gt,
                                   const Image<T>& sr, const StyleStatistics& statistics,
                                   const MutableImage<T>& grad_sr, void* workspace,
                                   Stream stream) {
  if (gt.by_fours() && sr.by_fours() && grad_sr.by_fours()) {
    return backward<Reading::fours>(grads, gt, sr, statistics, grad_sr, workspace, stream);
  }
  return gt.flat() && sr.flat() && grad_sr.flat()
             ? backward<Reading::flat>(grads, gt, sr, statistics, grad_sr, workspace, stream)
             : backward<Reading::strided>(grads, gt, sr, statistics, grad_sr, workspace, stream);
}

#define MGHF_STYLE(T)                                                                            \
  template int64_t content_style_workspace_bytes(const Image<T>&, const StyleOptions&);          \
  template int64_t content_style_backward_workspace_bytes(const Image<T>&, int64_t);             \
  template const char* content_style(const Image<T>&, const Image<T>&, const StyleOptions&,      \
                                     const StyleResults&, void*, Stream);                        \
  template const char* content_style_backward(const StyleGradients&, const Image<T>&,            \
                                              const Image<T>&, const StyleStatistics&,           \
                                              const MutableImage<T>&, void*, Stream);
MGHF_STYLE(float)
MGHF_STYLE(Half)
MGHF_STYLE(BFloat16)

}  // namespace mghf::cuda
