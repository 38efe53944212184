// The sub-networks' forward for relu6 or leaky_relu and up to 64 features on GPUs with products of
// warpgroups (wgmma.h): rows of hidden values stream past weights that stay.
//
// A block has a strip of 64 columns of an image, of which the outer two count only at the image's
// borders, and some rows. The packed weights of a sub-network lie in its shared memory, and beside
// them a ring of four rows of A(E f), so that no hidden value is in memory and a row is computed
// once. Two warpgroups take rows in turn; one of them, for its row j,
//
//     1. makes row j of A(E f) from features in its registers, by products of a warpgroup, whose
//        matrices have 64 rows, the pixels; and puts it into the ring;
//     2. makes row j - 1 of D of the ring, group of channels by group, where it lies as a factor of
//        the products with P, which run while the next group is made; then what comes of the
//        result.
//
// While one makes products the other has the 3x3 layer. They wait for each other by counters, two
// for each place of the ring: until a row is there, and until it has been read.
//
// Products of float32 are three of halves (halves.h), or one where less precision is asked for;
// those of halves and bfloat16 one. The power of two for features is that of each pixel's largest,
// for hidden values see coupling_rows_activation.h. Small products are added up before the large
// ones, or apart from them, so that a large sum is cut off at most 8 times.
//
// Predicted for float32, C = 128, on an H200 at 1.75 GHz. A row of 64 pixels takes 24 products
// m64n64k16 of E and 24 of P, 32 cycles each: 1,536 cycles of tensor cores. Shared memory, 128
// bytes a cycle: the 3x3 layer reads 12 quads and 9 of taps for two pixels and four channels, 1,824
// cycles a row; products read 98 KB of weights, 768; the ring is written, 256: 2,850 cycles, the
// bound. A scheduler issues about 2,600 instructions a row (counted; 3,100 where slopes are kept),
// half of them those of the 3x3 layer. 512 x 512 pixels are 9 strips of 14 runs of 37 rows, 39 with
// those around: 126 blocks, 0.064 ms for a sub-network if nothing else stalls, 0.2 ms for three;
// 0.3 ms are expected. With one product for three the tensor cores take 512 cycles a row, weights
// 256 of shared memory, which bounds a row by 2,340 cycles; about 2,100 instructions are issued.
#pragma once

#include "bulk.h"
#include "coupling_forward.h"
#include "coupling_rows_activation.h"
#include "coupling_rows_products.h"
#include "variants.h"
#include "wgmma.h"

namespace mghf::cuda {

namespace {

constexpr int kRowsThreads = 2 * kWarpgroup;
constexpr int kStrip = 64, kOwnOfStrip = kStrip - 2;
constexpr int kRing = 4;

// How a call is cut into blocks.
struct RowsPlan {
  int strips, runs, rows;  // runs of so many rows

  __host__ __device__ int64_t blocks(int batch) const { return int64_t{batch} * strips * runs; }
};

// By the count of rows that the busiest multiprocessor streams, of 132; a run costs about four more
// than it has.
RowsPlan plan_rows(int64_t batch, int rows, int width) {
  constexpr int64_t kMultiprocessors = 132, kMore = 4;
  constexpr int kLeast = 4;
  RowsPlan best{width <= kStrip ? 1 : (width - 2 + kOwnOfStrip - 1) / kOwnOfStrip, 1, rows};
  int64_t least = INT64_MAX;
  const int strips = best.strips;
  for (int runs = 1; runs == 1 || (runs <= kMultiprocessors && rows / runs >= kLeast); ++runs) {
    const int of_run = (rows + runs - 1) / runs;
    const RowsPlan plan{strips, (rows + of_run - 1) / of_run, of_run};
    const int64_t blocks = plan.blocks(static_cast<int>(batch));
    const int64_t turns = (blocks + kMultiprocessors - 1) / kMultiprocessors;
    const int64_t cost = turns * (of_run + kMore);
    if (cost < least) best = plan, least = cost;
  }
  return best;
}

template <class T>
struct RowsStage {
  Tiling tiling;
  RowsPlan plan;
  Features<T> features;  // the sub-networks' input
  Role role;             // add, or couple with two sub-networks
  const unsigned char* weights[2];
  Features<T> other;     // for couple it becomes z1 exp(r) in between
  MutableChannels<T> y;
  float clamp;
  MutableState state;  // written if Sizes::kKeeps
  bool by_pairs = false;  // whether two pixels of y, from an even one on, are contiguous
};

// Rows of hidden values in shared memory, [pixel][channel]. Before every second pixel a group is
// left out: a quarter of a warp, or half of it where a quad is 8 bytes, reads or writes quads of
// pixels 2 apart, which so lie in all banks.
template <class T, int kHidden>
struct HiddenRow {
  static constexpr int kSize = kStrip * kHidden + kStrip / 2 * kGroup;  // elements
  T* data;

  // Offset of a thread's quad of the first group.
  static __device__ __forceinline__ int offset(int pixel) {
    return pixel * kHidden + pixel / 2 * kGroup + static_cast<int>(threadIdx.x) % 4 * 4;
  }
  // The pixel with that offset.
  static __device__ __forceinline__ int pixel_at(int offset) {
    return (offset - static_cast<int>(threadIdx.x) % 4 * 4 + kGroup / 2) / (kHidden + kGroup / 2);
  }
};

template <class T, int kHalfOf, bool kKeepsOf, int kPartsOfFactor = kPartsOf<T>,
          bool kLeakyOf = false>
struct RowsSizes {
  static constexpr int kHalf = kHalfOf, kHidden = 2 * kHalf, kParts = kPartsOfFactor;
  static constexpr bool kKeeps = kKeepsOf, kLeaky = kLeakyOf;  // leaky_relu, or relu6
  static constexpr int kGroups = kHalf / kGroup, kHiddenGroups = kHidden / kGroup;
  static constexpr RowsLayout kLayout{kHalf, kParts};
  using Row = HiddenRow<T, kHidden>;
  static constexpr int kRingBytes = kRing * Row::kSize * static_cast<int>(sizeof(T));
  static constexpr int kCounters = 2 * kRing + 1;
  static constexpr int kLargest = kLeaky ? kRing * kStrip : 0;  // magnitudes of pixels
  static constexpr size_t kBytes = kLayout.bytes() + kRingBytes + kCounters * sizeof(Counter) +
                                   kLargest * sizeof(float);
  static_assert(kLayout.bytes() % 16 == 0 && kLayout.scales() % 16 == 0);
};

// A block's part of an image: columns from `left` on, of which those from `first` to `end` - 1
// count, and rows.
struct StripOfRows {
  int b, left, first, end;
  Rows rows;

  __device__ __forceinline__ StripOfRows(const Tiling& t, const RowsPlan& plan, unsigned block) {
    const int place = static_cast<int>(block) % (plan.strips * plan.runs);
    const int strip = place % plan.strips, top = t.computed.first + place / plan.strips * plan.rows;
    b = static_cast<int>(block) / (plan.strips * plan.runs);
    left = strip * kOwnOfStrip;
    first = left + (strip > 0 ? 1 : 0);
    end = strip + 1 < plan.strips ? left + kStrip - 1 : t.width;
    rows = {top, top + plan.rows < t.computed.end ? top + plan.rows : t.computed.end};
  }
  __device__ __forceinline__ bool counts(int y, int x) const {
    return y >= rows.first && y < rows.end && x >= first && x < end;
  }
};

template <class Z, class T>
__device__ __forceinline__ void read_features(FeaturesOfRow<Z::kGroups>& to, const RowsStage<T>& s,
                                              const StripOfRows& strip, int y) {
  const PlaceInRow place;
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    const int x = strip.left + place.pixel + i;
    // Beyond the image nobody uses the results.
    const int64_t pixel = s.tiling.pixel(strip.b, y, x < s.tiling.width ? x : s.tiling.width - 1);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) read_quad(s.features.quad(pixel, n), to.of[n][i]);
  }
}

// The bits of a layer of a row, 16 for a group. Of a thread's two pixels a lane of four keeps the
// words of one pair of groups.
struct SlopesOfRow {
  uint32_t even = 0, words[2] = {};

  // Called for each group in turn.
  template <class Z>
  __device__ __forceinline__ void note(int group, Values& x, float six) {
    const uint32_t bits = slope_bits(x, !Z::kLeaky, six);
    if (group % 2 == 0) {
      even = bits;
    } else if (group / 2 == static_cast<int>(threadIdx.x) % 4) {
      words[0] = (even & 0xffff) | bits << 16;
      words[1] = even >> 16 | (bits & 0xffff0000);
    }
  }
  template <class Z, class T>
  __device__ __forceinline__ void keep(const RowsStage<T>& s, const StripOfRows& strip, int subnet,
                                       int layer, int y) const {
    const PlaceInRow place;
    if (place.lane >= Z::kHiddenGroups / 2) return;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      const int x = strip.left + place.pixel + i;
      if (!strip.counts(y, x)) continue;
      unsigned char* const to =
          s.state.template slopes<T>(s.state.pixel(strip.b, y, x), subnet) +
          layer * (slope_bytes(Z::kHalf) / 2) + place.lane * 4;
      *reinterpret_cast<uint32_t*>(to) = words[i];
    }
  }
};

// A row of A(E f) into its place in the ring, and for leaky_relu its largest magnitudes.
template <class Z, class T>
__device__ __forceinline__ void expand_row(const typename Z::Row& row, float* largest_of_row,
                                           const FeaturesOfRow<Z::kGroups>& features,
                                           const unsigned char* weights, SlopesOfRow& slopes) {
  const PlaceInRow place;
  const RowFactors<Z::kGroups, Z::kParts> factors(features);
  const HiddenSums<Z> sums(factors, weights);
  const float of_weights = *reinterpret_cast<const float*>(weights + Z::kLayout.scales());
  const float back[2] = {factors.scale[0].back * of_weights, factors.scale[1].back * of_weights};
  LargestOfRow largest;
  MGHF_UNROLL_ALL
  for (int part = 0; part < 2; ++part) {
    sums.wait_for(part);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      Values values;
      MGHF_UNROLL_ALL
      for (int k = 0; k < kValues; ++k) {
        values.all()[k] = sums.of[part][n * kValues + k] * back[k % 4 / 2];
      }
      const int group = part * Z::kGroups + n;
      if constexpr (Z::kKeeps) slopes.note<Z>(group, values, 6);
      MGHF_UNROLL_ALL
      for (int i = 0; i < 2; ++i) {
        float quad[4];
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) quad[q] = activated<Z::kLeaky>(values.at(i, q), 6);
        if constexpr (Z::kLeaky) largest.note(i, quad);
        write_quad(row.data + Z::Row::offset(place.pixel + i) + group * kGroup, quad);
      }
    }
  }
  if constexpr (Z::kLeaky) largest.keep(largest_of_row);
}

// The pixels that a thread's windows reach, as offsets in a row of the strip: reflected at the
// image's borders. At the strip's other borders they are others', for results that do not count.
template <class Row>
struct WindowColumns {
  int of[4];

  __device__ __forceinline__ WindowColumns(const StripOfRows& strip, int width) {
    const PlaceInRow place;
    MGHF_UNROLL_ALL
    for (int i = 0; i < 4; ++i) {
      const int at = reflected(strip.left + place.pixel + i - 1, width) - strip.left;
      of[i] = Row::offset(at < 0 ? 0 : at < kStrip ? at : kStrip - 1);
    }
  }
};

// By what results of D are multiplied to be factors of P, for a thread's two pixels; `largest`: of
// the ring's rows. Nothing for relu6.
template <class Z>
__device__ __forceinline__ void scale_hidden(float (&by)[2], const float* scales,
                                             const float* largest, const int (&rows)[3],
                                             const WindowColumns<typename Z::Row>& columns) {
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    float of_window = 0;
    MGHF_UNROLL_ALL
    for (int tap = 0; tap < 9; ++tap) {
      const int pixel = Z::Row::pixel_at(columns.of[i + tap % 3]);
      of_window = fmaxf(of_window, largest[rows[tap / 3] / Z::Row::kSize * kStrip + pixel]);
    }
    by[i] = PowerOfTwo(of_window * scales[2]).by;
  }
}

// result = P A(D ...) for a row whose window's rows are in the ring.
template <class Z, class T>
__device__ __forceinline__ void project_row(Values (&result)[Z::kGroups],
                                            const T* ring, const int (&rows)[3],
                                            const float* largest,
                                            const WindowColumns<typename Z::Row>& columns,
                                            const unsigned char* weights, SlopesOfRow& slopes) {
  const PlaceInRow place;
  const float* const taps =
      reinterpret_cast<const float*>(weights + Z::kLayout.taps()) + place.lane * 4;
  const unsigned char* const matrix = weights + Z::kLayout.second();
  const float* const scales = reinterpret_cast<const float*>(weights + Z::kLayout.scales());
  float by[2];
  if constexpr (Z::kLeaky) scale_hidden<Z>(by, scales, largest, rows, columns);
  ResultSums<Z> sums;
  MGHF_UNROLL(1)
  for (int first = 0; first < Z::kHiddenGroups; first += 2) {
    MGHF_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int group = first + k;
      Values inner = {};
      MGHF_UNROLL_ALL
      for (int y = 0; y < 3; ++y) {
        float w[3][4];
        MGHF_UNROLL_ALL
        for (int tap = 0; tap < 3; ++tap) {
          read_quad(taps + (y * 3 + tap) * Z::kHidden + group * kGroup, w[tap]);
        }
        MGHF_UNROLL_ALL
        for (int x = 0; x < 4; ++x) {
          float quad[4];
          read_quad(ring + (rows[y] + columns.of[x]) + group * kGroup, quad);
          MGHF_UNROLL_ALL
          for (int i = 0; i < 2; ++i) {
            if (x < i || x > i + 2) continue;
            MGHF_UNROLL_ALL
            for (int q = 0; q < 4; ++q) inner.at(i, q) += w[x - i][q] * quad[q];
          }
        }
      }
      if constexpr (Z::kKeeps) slopes.note<Z>(group, inner, 6 * kHiddenScale);
      MGHF_UNROLL_ALL
      for (int i = 0; i < 4; ++i) {
        const float* const of = &inner.of[i / 2][i % 2 * 2];
        const auto factor = [&](int n) {
          const float value = activated<Z::kLeaky>(of[n], 6 * kHiddenScale);
          if constexpr (Z::kLeaky) return value * by[i % 2];
          return value;
        };
        sums.set(group, i, factor(0), factor(1));
      }
      sums.multiply(group, matrix);
    }
  }
  float back[2] = {scales[1], scales[1]};
  if constexpr (Z::kLeaky) back[0] *= inverse_of_power(by[0]), back[1] *= inverse_of_power(by[1]);
  sums.finish(result, back);
}

// A thread's part of the features that a row of results is added to or scales.
template <class Z, class T>
__device__ __forceinline__ void read_other(FeaturesOfRow<Z::kGroups>& to, const RowsStage<T>& s,
                                           const StripOfRows& strip, int y) {
  const PlaceInRow place;
  MGHF_UNROLL_ALL
  for (int i = 0; i < 2; ++i) {
    const int x = strip.left + place.pixel + i;
    if (!strip.counts(y, x)) continue;
    const int64_t pixel = s.tiling.pixel(strip.b, y, x);
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) read_quad(s.other.quad(pixel, n), to.of[n][i]);
  }
}

// Two neighbouring pixels of four channels, aligned to both.
template <class T>
__device__ __forceinline__ void write_pairs(const MutableChannels<T>& to, int b, int y, int x,
                                            int group, const float (&values)[2][4]) {
  const int c = group * kGroup + PlaceInRow().lane * 4;
  T* const first = to.image.pixel(b, y, x) + (to.first + c) * to.image.channel_stride;
  MGHF_UNROLL_ALL
  for (int q = 0; q < 4; ++q) {
    if (c + q >= to.count) continue;
    T* const place = first + q * to.image.channel_stride;
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float2*>(place) = float2{values[0][q], values[1][q]};
    } else {
      *reinterpret_cast<uint32_t*>(place) = pair_of<T>(values[0][q], values[1][q]);
    }
  }
}

// What comes of a sub-network's result in row y: phi's is added, rho's scales z1, eta's is added to
// that.
template <class Z, class T>
__device__ __forceinline__ void finish_row(Values (&result)[Z::kGroups],
                                           const FeaturesOfRow<Z::kGroups>& other,
                                           const RowsStage<T>& s, const StripOfRows& strip,
                                           int subnet, int y) {
  const PlaceInRow place;
  const int x = strip.left + place.pixel;
  const bool counts[2] = {strip.counts(y, x), strip.counts(y, x + 1)};
  const int64_t pixel = s.tiling.pixel(strip.b, y, x);
  MGHF_UNROLL_ALL
  for (int n = 0; n < Z::kGroups; ++n) {
    float value[2][4];
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      if (!counts[i]) continue;
      const float(&before)[4] = other.of[n][i];
      if (subnet == kRho) {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          value[i][q] = expf(log_scale_of(result[n].at(i, q), s.clamp));
        }
        if constexpr (Z::kKeeps) {
          unsigned char* const kept = s.state.pixel(strip.b, y, x + i);
          write_quad(MutableState::scale<T>(kept, n), value[i]);
          if (s.state.has_z1) write_quad(s.state.template z1<T>(kept, n), before);
        }
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) value[i][q] *= before[q];
      } else {
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) value[i][q] = result[n].at(i, q) + before[q];
      }
      if (subnet != kEta) write_quad(s.other.quad(pixel + i, n), value[i]);
    }
    if (subnet == kRho) continue;
    if (s.by_pairs && counts[0] && counts[1]) {
      write_pairs(s.y, strip.b, y, x, n, value);
      continue;
    }
    MGHF_UNROLL_ALL
    for (int i = 0; i < 2; ++i) {
      if (counts[i]) s.y.write(strip.b, y, x + i, n, value[i]);
    }
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(kRowsThreads, 1) stream_rows(RowsStage<T> s) {
  if constexpr (!kWarpgroupProducts) {
    never();
  } else {
    MGHF_DYNAMIC_SHARED(unsigned char, weights);
    T* const ring = reinterpret_cast<T*>(weights + Z::kLayout.bytes());
    Counter* const made = reinterpret_cast<Counter*>(weights + Z::kLayout.bytes() + Z::kRingBytes);
    Counter *const read = made + kRing, *const loaded = read + kRing;
    float* const largest = reinterpret_cast<float*>(made + Z::kCounters);
    if (threadIdx.x == 0) {
      for (int i = 0; i < kRing; ++i) {
        made[i].begin(kWarpgroup);
        read[i].begin(kWarpgroup);
      }
      loaded->begin(1);
    }
    publish_counters();
    const StripOfRows strip(s.tiling, s.plan, blockIdx.x);
    const WindowColumns<typename Z::Row> columns(strip, s.tiling.width);
    const int height = s.tiling.height;
    // A shuffle, because the compiler must see that a warp stays together: otherwise it makes
    // products one by one.
    const int warpgroup =
        __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
    const int top = strip.rows.first > 0 ? strip.rows.first - 1 : 0;
    // Rows of the ring, each with the row of results above it; beyond the last the turns are empty,
    // so that every counter has as many rounds for each sub-network.
    const int turns = (strip.rows.end - top + 1 + kRing - 1) / kRing * kRing;
    const int subnets = s.role == Role::couple ? 2 : 1;
    FeaturesOfRow<Z::kGroups> features;
    const auto expands = [&](int j) { return top + j <= strip.rows.end && top + j < height; };
    MGHF_UNROLL(1)
    for (int i = 0; i < subnets; ++i) {
      if (i > 0) __syncthreads();  // the weights before are in use
      if (threadIdx.x == 0) {
        loaded->arrive(Z::kLayout.bytes());
        copy_bulk(weights, s.weights[i], Z::kLayout.bytes(), *loaded);
      }
      const int subnet = s.role == Role::couple ? kRho + i : kPhi, before = i * (turns / kRing);
      if (expands(warpgroup)) read_features<Z>(features, s, strip, top + warpgroup);
      loaded->wait(i % 2);
      MGHF_UNROLL(1)
      for (int pair = 0; pair < turns; pair += 2) {
        const int j = pair + warpgroup, y = top + j;
        SlopesOfRow slopes;
        // The last turns that read what this one replaces. The one before was waited for then.
        for (int of = j - 3; of < j - 1; ++of) {
          if (of >= 0) read[of % kRing].wait((before + of / kRing) % 2);
        }
        if (expands(j)) {
          const typename Z::Row row{ring + j % kRing * Z::Row::kSize};
          expand_row<Z, T>(row, largest + j % kRing * kStrip, features, weights, slopes);
          if constexpr (Z::kKeeps) slopes.template keep<Z>(s, strip, subnet, 0, y);
        }
        made[j % kRing].arrive();
        // Row j - 2 was waited for then. A warp's windows reach into what others made.
        for (int of = j > 0 ? j - 1 : 0; of <= j; ++of) {
          made[of % kRing].wait((before + of / kRing) % 2);
        }
        if (y > strip.rows.first && y <= strip.rows.end) {
          int rows[3];
          MGHF_UNROLL_ALL
          for (int tap = 0; tap < 3; ++tap) {
            rows[tap] = (reflected(y - 2 + tap, height) - top) % kRing * Z::Row::kSize;
          }
          FeaturesOfRow<Z::kGroups> other;
          read_other<Z>(other, s, strip, y - 1);
          Values result[Z::kGroups];
          SlopesOfRow second;
          project_row<Z>(result, ring, rows, largest, columns, weights, second);
          read[j % kRing].arrive();
          if (expands(j + 2)) read_features<Z>(features, s, strip, y + 2);
          if constexpr (Z::kKeeps) second.template keep<Z>(s, strip, subnet, 1, y - 1);
          finish_row<Z>(result, other, s, strip, subnet, y - 1);
        } else {
          read[j % kRing].arrive();
          if (expands(j + 2)) read_features<Z>(features, s, strip, y + 2);
        }
      }
    }
  }
}

// Whether a block is for this kernel: relu6 or leaky_relu, at most 64 features a sub-network, and a
// GPU whose newer kernels have not failed their trial.
const char* streams_rows(const CouplingShape& shape, int64_t half, const Gpu& gpu, bool& streams) {
  bool products = false;
  if (const char* error = has_warpgroup_products(products); error != nullptr) return error;
  using Largest = RowsSizes<float, kWidestRows, true, 2, true>;
  streams = products && shape.activation != Activation::softplus && half <= kWidestRows &&
            gpu.shared_bytes >= static_cast<int64_t>(Largest::kBytes) &&
            newest(Variant::coupling);
  return nullptr;
}

struct RowsOptions {
  int64_t half;
  bool leaky, keeps, once;  // leaky_relu or relu6; keeps slopes; products are one each
};

template <int kHalf, int kParts, bool kLeaky, class T>
const char* stream_rows_of(const RowsStage<T>& s, bool keeps, Stream stream) {
  const int64_t blocks = s.plan.blocks(s.tiling.batch);
  using Plain = RowsSizes<T, kHalf, false, kParts, kLeaky>;
  using Keeping = RowsSizes<T, kHalf, true, kParts, kLeaky>;
  return keeps ? launch(stream_rows<T, Keeping>, {blocks, kRowsThreads, Keeping::kBytes}, stream, s)
               : launch(stream_rows<T, Plain>, {blocks, kRowsThreads, Plain::kBytes}, stream, s);
}
template <int kHalf, int kParts, class T>
const char* stream_rows_of(const RowsStage<T>& s, const RowsOptions& options, Stream stream) {
  return options.leaky ? stream_rows_of<kHalf, kParts, true>(s, options.keeps, stream)
                       : stream_rows_of<kHalf, kParts, false>(s, options.keeps, stream);
}
template <class T>
const char* launch_rows(RowsStage<T> s, const RowsOptions& options, Stream stream) {
  s.plan = plan_rows(s.tiling.batch, s.tiling.computed.count(), s.tiling.width);
  const MutableImage<T>& y = s.y.image;
  s.by_pairs = y.column_stride == 1 && y.row_stride % 2 == 0 && y.channel_stride % 2 == 0 &&
               y.batch_stride % 2 == 0 &&
               reinterpret_cast<uintptr_t>(y.data) % (2 * sizeof(T)) == 0;
  if (options.once) {
    return options.half == 32 ? stream_rows_of<32, 1>(s, options, stream)
                              : stream_rows_of<64, 1>(s, options, stream);
  }
  return options.half == 32 ? stream_rows_of<32, kPartsOf<T>>(s, options, stream)
                            : stream_rows_of<64, kPartsOf<T>>(s, options, stream);
}

}  // namespace

}  // namespace mghf::cuda
