// Products of small matrices by the tensor cores of a warpgroup, four neighbouring warps, from
// compute capability 9.0a on: d (64 x N) += a (64 x 16) b (16 x N), of halves, the sums in float32.
// Warp w of the four has rows 16 w ... 16 w + 15, in the registers' order of mma.h:
//
//     a[0..3]            as for depth 16 there
//     d[4 j ... 4 j + 3] columns 8 j ... 8 j + 7 as there
//
// b lies in shared memory, in cores of 8 columns by 8 depths, 128 contiguous bytes: a column's 8
// depths are 16 bytes.
//
// The products run while the threads go on. Between a product and the wait for it nobody may change
// a or d or the shared memory of b, and d has no result yet:
//
//     publish_shared();                        b's writers, once it is written
//     begin_products();
//     multiply_add_later(d, a, columns); ...   several to the same d are added in order
//     end_products();                          a group
//     wait_for_products<0>();
//
// The emulator makes the products when they are waited for, the latest time possible, and fails the
// launch if a factor or sum has changed by then or if begin_products() is missing.
#pragma once

#include "mma.h"

namespace mghf::cuda {

constexpr int kWarpgroup = 4 * kWarp;

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroupProducts = true;
#else
constexpr bool kWarpgroupProducts = false;
#endif

// Whether the code that the current device runs has them. Returns an error text, or null.
const char* has_warpgroup_products(bool& has);

// Where b begins and how far apart its cores are, in bytes, all multiples of 16 and below 2^18:
// along the depth and along the columns. The layout is that of a descriptor without swizzling.
struct SharedColumns {
  uint64_t descriptor;

  __device__ __forceinline__ SharedColumns(const void* shared, int along_depth, int along_columns)
      : descriptor(field(offset_of(shared), 0) | field(along_depth, 16) |
                   field(along_columns, 32)) {}
  // The same, that many bytes further.
  __device__ __forceinline__ SharedColumns further(int bytes) const {
    SharedColumns moved = *this;
    moved.descriptor += static_cast<uint64_t>(bytes / 16);
    return moved;
  }

 private:
  static __device__ __forceinline__ uint64_t field(int bytes, int place) {
    return static_cast<uint64_t>((bytes & 0x3ffff) >> 4) << place;
  }
  static __device__ __forceinline__ int offset_of(const void* shared) {
#ifdef __CUDA_ARCH__
    return static_cast<int>(__cvta_generic_to_shared(shared));
#elif !defined(__CUDACC__)
    return static_cast<int>(static_cast<const unsigned char*>(shared) -
                            static_cast<const unsigned char*>(host::dynamic_shared()));
#else
    return 0;
#endif
  }
};

// Makes a block's writes to shared memory visible to later products; also a barrier of the block.
__device__ __forceinline__ void publish_shared() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncthreads();
}

// Makes the registers' values visible to the products that follow.
__device__ __forceinline__ void begin_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  host::begin_products();
#endif
}
// Ends a group of products.
__device__ __forceinline__ void end_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif !defined(__CUDACC__)
  host::end_group_of_products();
#endif
}
// Waits until at most the last kGroups groups of products are under way.
template <int kGroups>
__device__ __forceinline__ void wait_for_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
  host::wait_for_products(kGroups);
#endif
}

#if !defined(__CUDACC__)
namespace host_wgmma {

// What a thread reads of b: the words of its two pairs of depths in every eighth column. All
// threads of a warp read all of it.
template <int kColumns>
struct Columns {
  uint32_t words[kColumns / 8][2];

  explicit Columns(uint64_t descriptor) {
    const auto bytes = [&](int place) { return (descriptor >> place & 0x3fff) << 4; };
    const size_t g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const unsigned char* const from =
        static_cast<unsigned char*>(host::dynamic_shared()) + bytes(0) + g * 16 + t * 4;
    for (size_t j = 0; j < kColumns / 8; ++j) {
      for (size_t half = 0; half < 2; ++half) {
        std::memcpy(&words[j][half], from + j * bytes(32) + half * bytes(16), 4);
      }
    }
  }
};

template <int kColumns>
struct Product final : host::Product {
  float* d;
  const uint32_t* a;
  uint64_t b;
  uint32_t a_then[4];
  float d_then[kColumns / 2];
  Columns<kColumns> b_then;

  Product(float* sums, const uint32_t* factor, uint64_t columns)
      : d(sums), a(factor), b(columns), b_then(columns) {
    std::memcpy(a_then, a, sizeof a_then);
    remember();
  }
  void remember() override { std::memcpy(d_then, d, sizeof d_then); }
  bool unchanged() const override {
    const Columns<kColumns> now(b);
    return std::memcmp(a, a_then, sizeof a_then) == 0 &&
           std::memcmp(d, d_then, sizeof d_then) == 0 &&
           std::memcmp(&now, &b_then, sizeof now) == 0;
  }
  void make() const override {
    for (int j = 0; j < kColumns / 8; ++j) {
      mma_pairs<Half>(reinterpret_cast<float(&)[4]>(d[4 * j]), a_then, b_then.words[j]);
    }
  }
};

}  // namespace host_wgmma
#endif

// d += a b, of halves. All threads of the warpgroup call it.
template <int kColumns>
__device__ __forceinline__ void multiply_add_later(float (&d)[kColumns / 2], const uint32_t (&a)[4],
                                                   const SharedColumns& columns) {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 112 || kColumns == 128);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const uint64_t b = columns.descriptor;
  if constexpr (kColumns == 32) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15}, "
        "{%16, %17, %18, %19}, %20, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kColumns == 64) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kColumns == 112) {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n112k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55}, "
        "{%56, %57, %58, %59}, %60, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
          "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, "
        "%8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, "
        "%40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, "
        "%56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]),
          "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),
          "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]),
          "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),
          "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]),
          "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]),
          "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]),
          "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
#elif !defined(__CUDACC__)
  host::multiply_later(
      std::make_unique<host_wgmma::Product<kColumns>>(d, a, columns.descriptor));
#else
  never();
#endif
}

}  // namespace mghf::cuda
