// The sub-networks' kernel for the forward, which the gradient recomputes, and the inverse; see
// coupling.cu.
#pragma once

#include "coupling_stages.h"
#include "coupling_state.h"

namespace mghf::cuda {

namespace {

enum class Role { add, couple, unscale, grad_rho };

// What is done with the sub-networks' result, by role:
//     add        other += sign result; the image y if there is one
//     couple     other is z1; y
//     unscale    other *= exp(-r)
//     grad_rho   other is z1, g the first half of the gradient of y; `scaled` becomes g1 exp(r),
//                `gradients` (d_r, g1)
template <class T>
struct ForwardStage : Stage<T> {
  Role role;
  int count;  // of sub-networks
  Features<T> other;
  MutableChannels<T> y;  // y.image.data may be null
  Channels<T> g;
  Features<T> scaled, gradients;
  float sign;
  bool keeps;
  MutableState state;  // written if Sizes::kKeeps
};

template <class T, int kHalfOf, int kRowsOf, int kRowsOfWarpOf, int kSliceOf, bool kKeepsOf>
struct ForwardSizes {
  static constexpr bool kKeeps = kKeepsOf;  // what the gradient needs, of relu6 or leaky_relu
  static constexpr int kHalf = kHalfOf, kRows = kRowsOf, kRowsOfWarp = kRowsOfWarpOf;
  static constexpr int kSlice = kSliceOf, kWarps = kRows / kRowsOfWarp, kThreads = kWarps * kWarp;
  static constexpr int kAcross = kColumns + 2, kPixels = (kRows + 2) * kAcross;
  static constexpr int kGroups = kHalf / kGroup;
  static constexpr int kFeatures = Tile<T, kHalf>::size(kPixels);  // elements
  static constexpr int kHidden = Tile<T, kSlice>::size(kPixels);
  static constexpr int kOwn = kRows * kColumns;
  static constexpr size_t kBytesWithoutSlopes =
      (kFeatures + kHidden) * sizeof(T) + 9 * kSlice * 4;
  static constexpr size_t kBytes =
      kBytesWithoutSlopes + (kKeeps ? kOwn * Slopes<kHalf>::kBytes : 0);
};

// Notes the bits of the tile's own pixels, whose indices are row by row, for a layer.
template <class Z>
struct SlopeNote {
  Slopes<Z::kHalf> slopes;
  int layer, first_group;
  bool relu6;

  // `pixel` is one of the tile with its halo.
  __device__ __forceinline__ void operator()(int pixel, int group, Values& x) const {
    const uint32_t bits = slope_bits(x, relu6);
    const int lane = opaque(static_cast<int>(threadIdx.x)) % 4;
    if (lane >= 2) return;
    const int own = pixel + lane, row = own / Z::kAcross - 1, column = own % Z::kAcross - 1;
    if (row < 0 || row >= Z::kRows || column < 0 || column >= kColumns) return;
    slopes.word(row * kColumns + column, layer, first_group + group) =
        static_cast<uint16_t>(bits >> (lane * kGroup));
  }
};

// result += S(f) on the block's tile, of which a warp has kRowsOfWarp rows.
template <class Z, class T>
__device__ __forceinline__ void add_subnet(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                           const Tile<T, Z::kHalf>& features,
                                           const Tile<T, Z::kSlice>& hidden, float* taps,
                                           const Slopes<Z::kHalf>& slopes,
                                           const ForwardStage<T>& s, const SubnetWeights& w) {
  using P = Exact<T>;
  constexpr int kSlices = Z::kSlice / kGroup;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int first = warp * Z::kRowsOfWarp * Z::kAcross + 2 * g;
  // Where bits are kept the compiler need not know softplus.
  const bool relu6 = s.activation == Activation::relu6;
  const Activation activation =
      !Z::kKeeps ? s.activation : relu6 ? Activation::relu6 : Activation::leaky_relu;
  MGHF_UNROLL(1)
  for (int slice = 0; slice * Z::kSlice < s.hidden; ++slice) {
    read_taps<Z::kThreads, Z::kSlice>(taps, w.depthwise, slice, s.hidden);
    if constexpr (Z::kKeeps) {
      expand<P, Z::kPixels, Z::kWarps>(hidden, features, w.expand, slice, activation,
                                       SlopeNote<Z>{slopes, 0, slice * kSlices, relu6});
    } else {
      expand<P, Z::kPixels, Z::kWarps>(hidden, features, w.expand, slice, activation);
    }
    __syncthreads();
    MGHF_UNROLL(1)
    for (int group = 0; group < kSlices; ++group) {
      Values inner[Z::kRowsOfWarp] = {};
      depthwise<Z::kAcross, false>(inner, hidden, taps, group, first);
      MGHF_UNROLL_ALL
      for (int i = 0; i < Z::kRowsOfWarp; ++i) {
        if constexpr (Z::kKeeps) {
          const uint32_t bits = slope_bits(inner[i], relu6);
          // Opaque, because there are no registers for what can be computed again.
          const int thread = opaque(static_cast<int>(threadIdx.x)), lane = thread % 4;
          const int row = thread / kWarp * Z::kRowsOfWarp + i;
          const int own = row * kColumns + thread % kWarp / 4 * 2 + lane;
          if (lane < 2) {
            slopes.word(own, 1, slice * kSlices + group) =
                static_cast<uint16_t>(bits >> (lane * kGroup));
          }
        }
        activate<kValues>(inner[i].all(), activation);
      }
      multiply_add<P>(result, inner, w.project, (slice * kSlices + group) * Z::kGroups);
    }
    __syncthreads();
  }
}

// Copies the bits of a sub-network from shared memory.
template <class Z, class T>
__device__ __forceinline__ void keep_slopes(const Slopes<Z::kHalf>& slopes,
                                            const ForwardStage<T>& s, const TileOrigin& place,
                                            int subnet) {
  constexpr int kCopies = Slopes<Z::kHalf>::kCopies;
  MGHF_UNROLL(1)
  for (int i = opaque(static_cast<int>(threadIdx.x)); i < Z::kOwn * kCopies; i += Z::kThreads) {
    const int own = i / kCopies, part = i % kCopies;
    const int y = place.y + own / kColumns, x = place.x + own % kColumns;
    if (!s.tiling.computes(y, x)) continue;
    unsigned char* const to = s.state.template slopes<T>(s.state.pixel(place.b, y, x), subnet);
    *reinterpret_cast<uint4*>(to + part * 16) =
        *reinterpret_cast<const uint4*>(slopes.copy(own, part));
  }
}

// result, which is r before its clamp, becomes z1 exp(r).
template <class Z, class T>
__device__ __forceinline__ void scale_z1(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                         const ForwardStage<T>& s, const TileOrigin& place) {
  const int thread = opaque(static_cast<int>(threadIdx.x));
  const int warp = thread / kWarp, g = thread % kWarp / 4;
  MGHF_UNROLL_ALL
  for (int i = 0; i < Z::kRowsOfWarp; ++i) {
    MGHF_UNROLL_ALL
    for (int row = 0; row < 2; ++row) {
      const int y = place.y + warp * Z::kRowsOfWarp + i, x = place.x + 2 * g + row;
      if (!s.tiling.computes(y, x)) continue;
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        float z1[4], scale[4];
        read_quad(s.other.quad(s.tiling.pixel(place.b, y, x), n), z1);
        MGHF_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          float& value = result[n][i].at(row, q);
          scale[q] = expf(log_scale_of(value, s.clamp));
          value = z1[q] * scale[q];
        }
        if constexpr (Z::kKeeps) {
          unsigned char* const kept = s.state.pixel(place.b, y, x);
          write_quad(MutableState::scale<T>(kept, n), scale);
          if (s.state.has_z1) write_quad(s.state.template z1<T>(kept, n), z1);
        }
      }
    }
  }
}

// Calls f(image row, image column, pixel, sums) for the pixels of a thread within the image, with
// the sums over all kParts parts of the warps, a quad for each group. The sums go through shared
// memory, which no other thread uses by then, because from registers each pixel would need its own
// code.
template <class Z, int kParts, class F>
__device__ __forceinline__ void for_own_pixels(Values (&result)[Z::kGroups][Z::kRowsOfWarp],
                                               float4* shared, const Tiling& tiling,
                                               const TileOrigin& place, const F& f) {
  constexpr int kPixels = 2 * Z::kRowsOfWarp, kThreads = Z::kRows / Z::kRowsOfWarp * kWarp;
  static_assert(kParts * kPixels * Z::kGroups * kThreads * sizeof(float4) <= Z::kBytes);
  const int thread = opaque(static_cast<int>(threadIdx.x)) % kThreads;
  const int part = static_cast<int>(threadIdx.x) / kThreads;
  const auto slot = [&](int of_part, int pixel, int n) -> float4& {
    return shared[((of_part * kPixels + pixel) * Z::kGroups + n) * kThreads + thread];
  };
  if (part < kParts) {
    MGHF_UNROLL_ALL
    for (int n = 0; n < Z::kGroups; ++n) {
      MGHF_UNROLL_ALL
      for (int pixel = 0; pixel < kPixels; ++pixel) {
        Values& v = result[n][pixel / 2];
        const int row = pixel % 2;
        slot(part, pixel, n) = float4{v.at(row, 0), v.at(row, 1), v.at(row, 2), v.at(row, 3)};
      }
    }
  }
  if (kParts > 1) __syncthreads();
  if (part >= kParts) return;
  const int top = place.y + thread / kWarp * Z::kRowsOfWarp;
  const int left = place.x + thread % kWarp / 4 * 2;
  MGHF_UNROLL(1)
  for (int pixel = part; pixel < kPixels; pixel += kParts) {
    const int y = top + pixel / 2, x = left + pixel % 2;
    if (!tiling.computes(y, x)) continue;
    float sums[Z::kGroups][4] = {};
    MGHF_UNROLL_ALL
    for (int of_part = 0; of_part < kParts; ++of_part) {
      MGHF_UNROLL_ALL
      for (int n = 0; n < Z::kGroups; ++n) {
        const float4 quad = slot(of_part, pixel, n);
        sums[n][0] += quad.x, sums[n][1] += quad.y, sums[n][2] += quad.z, sums[n][3] += quad.w;
      }
    }
    f(y, x, tiling.pixel(place.b, y, x), sums);
  }
}

// A role's values at a pixel: `result` is that of its last sub-network.
template <int kGroups, class T>
__device__ __forceinline__ void finish_pixel(const ForwardStage<T>& s, int b, int y, int x,
                                             int64_t pixel, float (&result)[kGroups][4]) {
  if (s.role == Role::couple) {
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) s.y.write(b, y, x, n, result[n]);
    return;
  }
  float other[kGroups][4];
  MGHF_UNROLL_ALL
  for (int n = 0; n < kGroups; ++n) read_quad(s.other.quad(pixel, n), other[n]);
  if (s.role == Role::grad_rho) {
    float g[kGroups][4];
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) s.g.read(b, y, x, n, g[n]);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kGroups; ++n) {
      float scaled[4], d_rho[4];
      MGHF_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        const float log_scale = log_scale_of(result[n][q], s.clamp);
        const float saturation = s.clamp > 0 ? log_scale / s.clamp : 0.0f;
        scaled[q] = g[n][q] * expf(log_scale);
        d_rho[q] = scaled[q] * other[n][q] * (1.0f - saturation * saturation);
      }
      write_quad(s.scaled.quad(pixel, n), scaled);
      write_quad(s.gradients.quad(pixel, n), d_rho);
      write_quad(s.gradients.quad(pixel, n + kGroups), g[n]);
    }
    return;
  }
  MGHF_UNROLL_ALL
  for (int n = 0; n < kGroups; ++n) {
    MGHF_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      float& value = other[n][q];
      value = s.role == Role::add ? value + s.sign * result[n][q]
                                  : value * expf(-log_scale_of(result[n][q], s.clamp));
    }
    write_quad(s.other.quad(pixel, n), other[n]);
    if (s.y.image.data != nullptr) s.y.write(b, y, x, n, other[n]);
  }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 2) forward_stage(ForwardStage<T> s) {
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  const Tile<T, Z::kHalf> features{reinterpret_cast<T*>(memory)};
  const Tile<T, Z::kSlice> hidden{features.data + Z::kFeatures};
  float* const taps = reinterpret_cast<float*>(hidden.data + Z::kHidden);
  const Slopes<Z::kHalf> slopes{reinterpret_cast<uint16_t*>(memory + Z::kBytesWithoutSlopes)};
  {
    const TileOrigin place(s.tiling, blockIdx.x);
    copy_tile<Z::kThreads, Z::kRows + 2, Z::kAcross>(features, s.features, s.tiling, place.b,
                                                     place.y - 1, place.x - 1);
  }
  if constexpr (Z::kKeeps) {
    // Slices of padding alone are not computed, and what is kept is the same in every run.
    constexpr int kCopies = Z::kOwn * Slopes<Z::kHalf>::kCopies;
    for (int i = threadIdx.x; i < kCopies; i += Z::kThreads) {
      *reinterpret_cast<uint4*>(slopes.copy(0, i)) = uint4{0, 0, 0, 0};
    }
  }
  end_copies();
  wait_for_copies<0>();
  __syncthreads();
  Values result[Z::kGroups][Z::kRowsOfWarp] = {};
  MGHF_UNROLL(1)
  for (int i = 0; i < s.count; ++i) {
    // eta is added to it.
    if (i > 0) scale_z1<Z>(result, s, TileOrigin(s.tiling, opaque(blockIdx.x)));
    add_subnet<Z>(result, features, hidden, taps, slopes, s, s.subnets[i]);
    if constexpr (Z::kKeeps) {
      keep_slopes<Z>(slopes, s, TileOrigin(s.tiling, opaque(blockIdx.x)),
                     s.role == Role::couple ? kRho + i : kPhi);
      if (i + 1 < s.count) __syncthreads();
    }
  }
  const TileOrigin place(s.tiling, opaque(blockIdx.x));
  for_own_pixels<Z, 1>(result, reinterpret_cast<float4*>(memory), s.tiling, place,
                       [&](int y, int x, int64_t pixel, float (&sums)[Z::kGroups][4]) {
                         finish_pixel(s, place.b, y, x, pixel, sums);
                       });
}

}  // namespace

}  // namespace mghf::cuda
