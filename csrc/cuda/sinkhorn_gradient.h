// The gradient through Sinkhorn's iterations, for the kernels of `sinkhorn` and `monce`; see
// sinkhorn_solver.h.
#pragma once

#include "sinkhorn_streaming.h"

namespace mghf::cuda {

template <int kColumnWords, bool kOnChip>
template <class Entry>
__device__ __forceinline__ void Solver<kColumnWords, kOnChip>::sum_gradient(
    Statistics& statistics, const Entry& entry) {
  for (int j = thread; j < pitch; j += threads) weights()[j] = 1;
  __syncthreads();
  float size = 0;
  sweep<1>(
      weights(),
      [&](int r, int j, float x) {
        const float value = first + r < n && j < n ? entry(r, j, x) : 0;
        size += fabsf(value);
        return value;
      },
      [&](int r, float sum) {
        if (lane == 0) df()[r] = sum;
        return 1.0f;
      },
      [&] {
        statistics.total = across_lanes(size, Add{});
        write_statistics(statistics);
      });
  exchange<Add>(statistics, [&](int j, float sum, Range&) { return dg()[j] = sum; });
}

template <int kColumnWords, bool kOnChip>
template <class Source>
__device__ __forceinline__ void Solver<kColumnWords, kOnChip>::recur(
    const Source& source, const Solution& solution, float negligible) {
  const History h = history();
  const int made = solution.made;
  int t = solution.stands_for;
  for (; t >= 1; --t) {
    const int now = t < made ? t : made, before = t - 1 < made ? t - 1 : made;
    const int term = t > made ? made + 1 : t;
    const bool begun = t > made && t < solution.stands_for;  // the term already has a value
    const float *const new_v = h.v(now), *const old_v = h.v(before), *const new_u = h.u(now);
    MGHF_UNROLL(1)
    for (int j = thread; j < pitch; j += threads) {
      const float weight = j < n ? new_v[j] * dg()[j] : 0;
      weights()[j] = weight;
      if (rank == 0 && j < n) h.columns(term)[j] = weight + (begun ? h.columns(term)[j] : 0);
    }
    __syncthreads();
    Statistics none;
    sweep(
        weights(), Plain{},
        [&](int r, float sum) {
          const int i = first + r;
          if (i >= n) return 0.0f;
          const float given = t == solution.stands_for ? df()[r] : 0;
          const float c = new_u[i] * (given - new_u[i] * sum);
          if (lane == 0) {
            h.rows(term)[i] = c + (begun ? h.rows(term)[i] : 0);
            u_of[r] = c;
          }
          return c;
        },
        [&] { write_statistics(none); });
    const int base = t > made ? solution.base : base_of(h, now);
    const int old_base = t > made ? solution.base : base_of(h, before);
    if (base != old_base) {
      source.fill(*this);
      build(h.a(base) + first, h.b(old_base));
      sweep_columns<Add>(
          [&](float total, int r, int, float x) { return total + u_of[r] * x; });
    }
    const Range range = exchange<Add>(none, [&](int j, float sum, Range&) {
                          return dg()[j] = j < n ? -old_v[j] * sum : 0;
                        }).numbers;
    if (base != old_base) {
      source.fill(*this);
      build(h.a(old_base) + first, h.b(old_base));
    }
    const float left = static_cast<float>(t) * static_cast<float>(n);
    if (left * (range.most - range.least) <= negligible) break;
  }
  if (rank == 0 && thread == 0) {
    const int reached = t < 1 ? 1 : t;
    h.first() = reached <= made ? reached : made + 1;
    h.last() = solution.stands_for <= made ? solution.stands_for : made + 1;
  }
}

// The terms' sum where K had several bases: every entry is a power of its own.
inline __device__ MGHF_NOINLINE float wide_correction(History h, Power power, int i, int j) {
  const int made = h.made(), last = h.last();
  float sum = 0;
  for (int term = h.first(); term <= last; ++term) {
    const int now = term < made ? term : made, before = term - 1 < made ? term - 1 : made;
    const int base = h.base(now), old_base = before == 0 ? 0 : h.base(before);
    const float exponent = power.exponent - h.a(base)[i];
    sum += power.power * h.u(now)[i] * scale(exponent - h.b(base)[j]) * h.columns(term)[j] +
           power.power * h.v(before)[j] * scale(exponent - h.b(old_base)[j]) * h.rows(term)[i];
  }
  return sum;
}

}  // namespace mghf::cuda
