// The rule by which Sinkhorn's iterations stop early, on the CPU and on CUDA. Twin: settle() of
// kernels/sinkhorn_potentials.py; benchmarks/iterations.py measures its effect.
#pragma once

// CUDA sources include the definition of __device__ before this file, in the host build too.
#if defined(__CUDACC__) || defined(__device__)
#define MGHF_ALSO_ON_DEVICE __device__ __forceinline__
#else
#define MGHF_ALSO_ON_DEVICE
#endif

namespace mghf {
namespace {

// It looks at the spread of each iteration's changes of v, largest minus smallest, because a factor
// that u and v exchange does not change the plan. If spreads fall at a rate, the changes still to
// come add up to rate / (1 - rate) times the last one. Rounding alone spreads the changes by 3e-7
// to 3e-6, more in larger matrices, so a spread below kClean says nothing about the rate: it is
// assumed to have fallen at the rate seen last. (A rule that waits for the spread to reach the
// rounding error runs through all iterations where it misses that by little.)
struct Settling {
  static constexpr float kClean = 1e-5f;
  static constexpr float kFastest = 0.05f;  // smallest rate that is believed from one iteration
  static constexpr float kRest = 1e-6f;     // largest change of log plan that may still be to come

  float previous = 1, rest = 1, rate = 1;

  // Called after iterations 1, 2, ...; false after the first. NaN never settles.
  MGHF_ALSO_ON_DEVICE bool settled(int t, float spread) {
    if (previous > kClean) {
#ifdef __CUDA_ARCH__
      rate = __fdividef(spread, previous);  // to 2^-22, in less code
#else
      rate = spread / previous;
#endif
      rate = rate < kFastest ? kFastest : rate;
      rest = spread;
    } else {
      rest *= rate;
    }
    previous = spread;
    return t > 1 && rate * rest <= kRest * (1 - rate);
  }
};

}  // namespace
}  // namespace mghf

#undef MGHF_ALSO_ON_DEVICE
