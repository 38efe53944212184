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
// with small work between them, some KB or MB and mostly latency: merge_runs (float64 statistics of
// each map) and sums_of_products are kernels of their own, because they need many blocks. The last
// block of a map's histogram computes its entropy; the last of an image's histograms selects (the
// kept maps, by rank, and three of the terms); the last of its sums takes Gram's difference
// (last_block.h). Sums are in a fixed order, whichever block comes last. Five launches.
//
// The backward prepares coefficients (fragments_of_style) and reads the pair once:
//
//   grad = naive D + [kept] (a D + centred (S - mean S) + other (X - mean X) + K S_kept)
//
// where X is D for maps that are almost equal, else G: with the other of the two the terms would
// nearly cancel. Up to 64 kept maps stay in shared memory as K while tiles of pixels come by
// (content_style_stream.h); others are multiplied by maps_gradient.h. Two launches. The gradient
// may take the place of G: what a thread reads of G is at the pixels and channels of which it then
// writes the gradient.
//
// Predicted floors for B = 1, C = 128, M = 64, 512 x 512, float32, at 4.3 TB/s: the moments and the
// histograms read 268 MB each, 62 us each (counting 67 M numbers in shared memory takes about as
// long), the products 134 MB, 31 us (268 MB where a pixel's channels lie side by side; their 3.2 G
// multiply-adds of TF32 take 21 us at 300 TFLOP/s), the small kernels some 20 us: 175 us. The
// backward reads 268 MB and writes 134, 94 us, behind which its 3.2 G multiply-adds hide. Halves:
// half the bytes, the same arithmetic.
#include "content_style.h"

#include "content_style_gradient.h"
#include "content_style_moments.h"
#include "content_style_selection.h"
#include "content_style_stream.h"
#include "histograms_counts.h"
#include "workspace.h"

namespace mghf::cuda {

namespace {

// ---- the forward's launches ----

struct ForwardSpace {
  Pieces pieces;
  float* partial = nullptr;
  double* statistics = nullptr;
  PairRanges ranges{};
  int* counts = nullptr;
  int64_t number_of_counts = 0;
  int* ended = nullptr;  // behind the counts: of both stacks' maps, of two sweeps' images
  int64_t cleared = 0;   // counts and `ended`
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
    cleared = number_of_counts + 2 * maps + 2 * sr.batch;
    counts = pieces.take<int>(cleared);
    ended = counts + number_of_counts;
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

// The entropies of both images' maps, first G's, and the selection. Images of the same layout are
// counted as one batch.
template <Reading kReading, class T>
const char* entropies(const Image<T>& gt, const Image<T>& sr, const ForwardSpace& space,
                      const Selection& selection, Stream stream) {
  const int bins = static_cast<int>(selection.options.bins);
  const int64_t maps = sr.batch * sr.channels, pixels = sr.pixels();
  const int64_t counts_of_gt = Counts::number(gt.batch, gt.channels, bins, gt.by_maps());
  const Counts of_gt{space.counts, bins, gt.by_maps()};
  const Counts of_sr{space.counts + counts_of_gt, bins, sr.by_maps()};
  const auto ranges = [&](int64_t first) {
    return Ranges{space.ranges.lows + first, space.ranges.highs + first, 1};
  };
  const Histograms<T> g{gt, ranges(0), of_gt, space.entropies, space.ended};
  const Histograms<T> s{sr, ranges(maps), of_sr, space.entropies + maps, space.ended + maps};
  const auto groups = [&](bool by_maps) {
    return by_maps ? sr.channels : blocks_for(sr.channels, kWarp);
  };
  const EntropiesAndSelection then{selection, space.ended + 2 * maps,
                                   groups(of_gt.by_maps) + groups(of_sr.by_maps)};
  if (of_gt.by_maps == of_sr.by_maps) {
    const Runs runs = runs_of_counts(pixels, of_gt.by_maps);
    return count<kReading>(Counted<T>{g, s, 2}, runs, then, stream);
  }
  const char* error = nullptr;
  for (const Histograms<T>* one : {&g, &s}) {
    const Runs runs = runs_of_counts(pixels, one->counts.by_maps);
    if (error == nullptr) error = count<kReading>(Counted<T>{*one, *one, 1}, runs, then, stream);
  }
  return error;
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
                 space.cleared, sr.batch, channels, pixels, runs);
  if (error != nullptr) return error;
  const Selection selection{space.entropies, space.statistics, space.compared, space.ranks,
                            space.ascending, space.places,     results,        options,
                            sr.batch,        channels};
  if (maps == 0) return launch(select, {sr.batch, kSelectThreads}, stream, selection);
  error = entropies<kReading>(gt, sr, space, selection, stream);
  if (error != nullptr) return error;
  const GramDifference then{space.totals,       space.places, results.weights,
                            results.difference, results.gram, maps,
                            pixels,             space.ended + 2 * sr.batch * channels + sr.batch};
  return products<true, kReading>(gt, sr, space.ascending.channels, maps, space.products,
                                  space.totals, options.precision != Precision::float32, stream,
                                  then);
}

// ---- the backward's launches ----

struct BackwardSpace {
  Pieces pieces;
  int *channels, *starts, *ranks;  // see StyleTerms; the kept maps' ranks, in each block's order
  StyleTerm* terms;
  uint4* fragments;

  template <class T>
  BackwardSpace(const Image<T>& sr, int64_t top_m, void* workspace) : pieces(workspace) {
    const int64_t maps = sr.batch * sr.channels, groups = groups_of(sr.channels);
    terms = pieces.take<StyleTerm>(maps);
    starts = pieces.take<int>(sr.batch * (groups + 1));
    channels = pieces.take<int>(sr.batch * top_m);
    ranks = pieces.take<int>(sr.batch * groups * kRowTiles * top_m);
    fragments = pieces.take<uint4>(number_of_fragments(sr.batch, sr.channels, top_m));
  }
};

template <Reading kReading, class T>
const char* backward(const StyleGradients& grads, const Image<T>& gt, const Image<T>& sr,
                     const StyleStatistics& statistics, const MutableImage<T>& grad_sr,
                     void* workspace, Stream stream) {
  const int64_t maps = statistics.top_m, groups = groups_of(sr.channels);
  const BackwardSpace space(sr, maps, workspace);
  const bool streamed = streams<kReading>(sr, maps);
  const char* const error =
      launch(fragments_of_style, {sr.batch * groups * kRowTiles, kGradientThreads}, stream, grads,
             statistics, space.channels, space.ranks, space.starts, space.terms, space.fragments,
             sr.channels, sr.pixels(), streamed);
  if (error != nullptr) return error;
  const StyleTerms<T> terms{gt, space.channels, space.starts, space.terms,
                            static_cast<int>(maps)};
  const bool once = statistics.precision != Precision::float32;
  if (streamed) {
    return write_streamed<kReading>(sr, grad_sr, space.fragments, terms, once, stream);
  }
  return write_gradient<kReading>(sr, grad_sr, space.fragments, terms, maps, once, stream);
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
