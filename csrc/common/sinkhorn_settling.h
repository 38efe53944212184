// When Sinkhorn's iterations have nothing left to do, on the CPU and on CUDA. Twin: settle() of
// kernels/sinkhorn_potentials.py; benchmarks/iterations.py shows what it comes to.
#pragma once

// CUDA's sources have included what defines __device__, their host build too.
#if defined(__CUDACC__) || defined(__device__)
#define MGHF_ALSO_ON_DEVICE __device__ __forceinline__
#else
#define MGHF_ALSO_ON_DEVICE
#endif

namespace mghf {
namespace {

// Takes the spread of each iteration's changes of v, largest less smallest: a factor that u and v
// exchange is no change of the plan. What is still to come adds up to rate / (1 - rate) times the
// last spread, if spreads fall at that rate. Rounding alone spreads the changes by 3e-7 to 3e-6, the
// more the larger the matrix, so a spread below kClean says nothing of the rate, and may be no
// change at all: it is taken to have gone on falling at the rate last seen. A rule that compares
// spreads with the rounding itself runs through all iterations where it misses it by little.
struct Settling {
  static constexpr float kClean = 1e-5f;
  static constexpr float kFastest = 0.05f;  // a single fall is trusted that far
  static constexpr float kRest = 1e-6f;     // what may be left of log plan's change

  float previous = 1, rest = 1, rate = 1;

  // Called after iterations 1, 2, ...; false after the first. NaN never settles.
  MGHF_ALSO_ON_DEVICE bool settled(int t, float spread) {
    if (previous > kClean) {
      rate = spread / previous;
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
