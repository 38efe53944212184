// The forward of `patches` where products of warpgroups and bulk copies are (compute capability
// 9.0a), for images whose rows are contiguous; see patches.cu.
#pragma once

#include "bulk.h"
#include "patches_rows_weights.h"
#include "wgmma.h"

namespace mghf::cuda {

namespace {

// A block takes 128 patches, in the order of maps, rows and columns, through both layers. A stage
// is one row of pixels of all its patches: a warp has them copied from the image, whole pieces of
// its rows, in which neighbouring patches overlap, and with them that row's weights, which are
// packed already. Two warpgroups of 64 patches each read a patch's pixels where it lies in the
// rows, four at a time, split them into halves and multiply them by the weights of 128 units; the
// next row is split while the products of the last are made. Nothing is brought into another order
// in shared memory, and nothing is split twice. After each row of pixels the sums, of 16 or 32
// products, are added up outside the tensor cores, which cut sums off, and there every patch's own
// power of two is undone. The hidden layer goes into the second layer's products from the registers
// that it is in.
//
// A pixel of half precision is one half, float16's as it is, bfloat16's by the row's power of two,
// so the products of the first layer are two, or one where the weights' small parts are left out.
//
// Predicted for an H200 (R = 56,448 patches of 32 x 32 at stride 24, see patches.cu; 1.755 GHz):
//   tensor cores   128 (1024 128 + 128 64) multiply-adds of a block by three products of halves,
//                  2048 a cycle: 26,100 cycles
//   issue slots    213 instructions (counted) of a warp for a row of pixels, of them 64 to add up;
//                  two warps a scheduler, 32 rows: 14,000 cycles, beside the products
//   shared memory  for a row of pixels 48 KB of weights that products read, 29 KB that copies
//                  write and 16 to 32 KB of pixels that threads read; 128 bytes a cycle: 24,000 to
//                  28,000 cycles
//   second cache   13 KB of pixels (each 1.33 times, for the rows that patches share) and 16 KB of
//                  weights for a row, 0.93 MB a block: 39,000 cycles at 5.5 TB/s for all SMs
// 441 blocks on 132 SMs, one at a time: 75 us by the second cache, 60 us by tensor cores in four
// rounds; 80 to 100 us are expected. (Blocks of a cluster could share the weights' way, which would
// save 18 us.) From memory it reads x (134 MB, 31 us) and writes 15.6 MB (4 us). With one product
// for three the tensor cores take 8,700 cycles, 166 instructions (counted) of a warp for a row of
// pixels 11,000 issue slots, and the second cache, with 8 KB of weights a row, 28,000 cycles, 54
// us: 60 to 75 us are expected. Half precision halves the bytes of pixels; issue slots of a row of
// pixels then are 182 for bfloat16 and 111 for float16 with one product (counted).
constexpr int kGroups = kRows / 64;  // of warps that multiply
constexpr int kRowsThreads = (kGroups + 1) * kWarpgroup;  // of the last group one warp copies
// Registers of a thread: for groups that multiply and for the one that copies, of 168 at the
// launch.
constexpr int kManyRegisters = 232, kFewRegisters = 40;
constexpr int kMostStages = 8;

// Change the number of registers of a warpgroup's threads, all of which call it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Parts of pixels where weights have so many: one half holds all bits of half precision.
template <class T, int kParts>
constexpr int kPartsOfPixels = sizeof(T) == 2 ? 1 : kParts;

// Sizes of a stage in bytes.
template <class T, int kSteps, int kParts>
struct Stage {
  static constexpr int kPixels = kRows * kSteps * kHalvesOfStep * static_cast<int>(sizeof(T));
  static constexpr int kOfPart = kSteps * step_bytes(kUnits);
  static constexpr int kWeights = kParts * kOfPart;
  static constexpr int kBytes = kPixels + kWeights;
};

// A piece of a row of an image, for the block's patches that are side by side in a map: its first
// pixel there for the patches' first rows, its place in a stage in pixels, and its length in bytes.
struct Piece {
  int64_t from;
  int to, bytes;
};

// What follows a layer's products: a column's sum is multiplied and a bias added, 0 in columns that
// are none.
struct AfterProducts {
  float first_back[kUnits], bias1[kUnits], second_back[kOutputs], bias2[kOutputs];

  // By a warp.
  __device__ __forceinline__ void fill(const RowsWeights& weights, const float* from1,
                                       const float* from2, const Patches& p) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    MGHF_UNROLL_ALL
    for (int n = lane; n < kUnits; n += kWarp) {
      first_back[n] = weights.first_back[n];
      bias1[n] = n < p.hidden ? from1[n] : 0.0f;
    }
    MGHF_UNROLL_ALL
    for (int n = lane; n < kOutputs; n += kWarp) {
      second_back[n] = weights.second_back[n];
      bias2[n] = n < p.dimension ? from2[n] : 0.0f;
    }
  }
};

struct RowsControl {
  Counter open[kMostStages], free[kMostStages], second, after_products;
  union {
    Piece pieces[kRows];
    AfterProducts after;  // once all pieces are copied
  };
  int rows;  // of the block, for when its registers are needed for others
};

// Stages that fit besides the second layer's weights.
template <class T, int kSteps, int kParts>
int64_t stages_within(int64_t shared_bytes) {
  const int64_t rest =
      shared_bytes - static_cast<int64_t>(sizeof(RowsControl)) - RowsWeights::second_bytes(kParts);
  return smaller(rest / Stage<T, kSteps, kParts>::kBytes, kMostStages);
}

// A block's patches, and where they lie in a stage.
struct BlockRows {
  int64_t first;  // their numbers
  int rows;
  int column;          // of the first patch in its row of patches
  int ahead, lines;    // patches of that row; rows of patches that the block touches
  int size, stride, columns;

  __device__ __forceinline__ BlockRows(const Patches& p, int64_t block)
      : first(block * kRows),
        rows(static_cast<int>(smaller(p.number() - first, kRows))),
        column(static_cast<int>(first % p.columns)),
        ahead(static_cast<int>(smaller(p.columns - column, rows))),
        lines(1 + static_cast<int>(up(rows - ahead, p.columns))),
        size(p.size),
        stride(p.stride),
        columns(p.columns) {}

  // Pixels of a row of that many patches.
  __device__ __forceinline__ int pixels(int patches) const { return (patches - 1) * stride + size; }
  __device__ __forceinline__ int patches_of(int line) const {
    return line == 0 ? ahead
                     : static_cast<int>(smaller(rows - ahead - (line - 1) * columns, columns));
  }
  // The first pixel of a line in a stage.
  __device__ __forceinline__ int start(int line) const {
    return line == 0 ? 0 : pixels(ahead) + (line - 1) * pixels(columns);
  }
  __device__ __forceinline__ int all_pixels() const {
    return start(lines - 1) + pixels(patches_of(lines - 1));
  }
  // The first pixel in a stage of one of the block's patches.
  __device__ __forceinline__ int place(int row) const {
    const int line = (column + row) / columns;
    return start(line) + (row - (line == 0 ? 0 : ahead + (line - 1) * columns)) * stride;
  }
  template <class T>
  __device__ __forceinline__ Piece piece(const Image<T>& x, const Patches& p, int line) const {
    const int64_t patch = line == 0 ? first : first + ahead + (line - 1) * columns;
    return {first_pixel(x, p.channels, patch / p.of_map(), patch % p.of_map(), columns, stride),
            start(line), pixels(patches_of(line)) * static_cast<int>(sizeof(T))};
  }
};

// Fills the stages, in a ring.
template <int kSteps, int kParts, class T>
__device__ __forceinline__ void copy_rows(unsigned char* stages, int number, unsigned char* second,
                                          RowsControl& control, const BlockRows& block,
                                          const Image<T>& x, const RowsWeights& weights) {
  using Size = Stage<T, kSteps, kParts>;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int bytes = block.all_pixels() * static_cast<int>(sizeof(T)) + Size::kWeights;
  int slot = 0, parity = 1;
  MGHF_UNROLL(1)
  for (int row = 0; row < block.size; ++row) {
    Counter& open = control.open[slot];
    unsigned char* const stage = stages + slot * Size::kBytes;
    if (row >= number) control.free[slot].wait(parity);
    if (lane == 0) {
      open.arrive(bytes);
      MGHF_UNROLL_ALL
      for (int part = 0; part < kParts; ++part) {
        const uint4* const from =
            weights.first + (part * block.size + row) * (Size::kOfPart / 16);
        copy_bulk(stage + Size::kPixels + part * Size::kOfPart, from, Size::kOfPart, open);
      }
    }
    __syncwarp();  // the bytes are announced
    MGHF_UNROLL(1)
    for (int line = lane; line < block.lines; line += kWarp) {
      const Piece& piece = control.pieces[line];
      copy_bulk(reinterpret_cast<T*>(stage) + piece.to,
                x.data + piece.from + row * x.row_stride, piece.bytes, open);
    }
    if (row == 0 && lane == 0) {
      control.second.arrive(RowsWeights::second_bytes(kParts));
      copy_bulk(second, weights.second, RowsWeights::second_bytes(kParts), control.second);
    }
    if (++slot == number) slot = 0, parity ^= 1;
  }
}

// The largest of a row's numbers, of which the four threads of a row have a share each.
__device__ __forceinline__ float largest_of_row(float own) {
  own = fmaxf(own, __shfl_xor_sync(kAllLanes, own, 1));
  return fmaxf(own, __shfl_xor_sync(kAllLanes, own, 2));
}

// A thread's share of a factor of two rows, in parts.
template <int kSteps, int kParts>
struct Parts {
  uint32_t of[kParts][kSteps][4];

  // Takes a row's pair of numbers.
  __device__ __forceinline__ void set(int pair, int half, const SplitHalves& split) {
    of[0][pair / 2][half + pair % 2 * 2] = split.big;
    if constexpr (kParts == 2) of[1][pair / 2][half + pair % 2 * 2] = split.small;
  }
};

// A row of pixels of two patches, a thread's share as a factor.
template <int kSteps, int kParts>
struct RowFactor {
  Parts<kSteps, kParts> parts;
  float back[2];

  template <class T>
  __device__ __forceinline__ void read(const T* pixels, const int (&places)[2]) {
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) take(pixels + places[half], half);
  }
  // Takes one patch's pixels.
  template <class T>
  __device__ __forceinline__ void take(const T* pixels, int half) {
    float values[kSteps][4];
    MGHF_UNROLL_ALL
    for (int step = 0; step < kSteps; ++step) {
      load_four(values[step], pixels + step * kHalvesOfStep);
    }
    split(values, half);
  }
  // Those that are halves as they are.
  __device__ __forceinline__ void take(const Half* pixels, int half) {
    back[half] = 1;
    MGHF_UNROLL_ALL
    for (int step = 0; step < kSteps; ++step) {
      const uint64_t four = *reinterpret_cast<const uint64_t*>(pixels + step * kHalvesOfStep);
      parts.of[0][step][half] = static_cast<uint32_t>(four);
      parts.of[0][step][half + 2] = static_cast<uint32_t>(four >> 32);
    }
  }
  // Takes one patch's numbers.
  __device__ __forceinline__ void split(const float (&values)[kSteps][4], int half) {
    float largest = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < 4 * kSteps; ++n) largest = fmaxf(largest, fabsf(values[n / 4][n % 4]));
    const PowerOfTwo power(largest_of_row(largest));
    back[half] = power.back;
    MGHF_UNROLL_ALL
    for (int n = 0; n < 2 * kSteps; ++n) {
      const float* const two = values[n / 2] + n % 2 * 2;
      parts.set(n, half, {two[0] * power.by, two[1] * power.by});
    }
  }
};

// Begins d += a b for all steps, the products of small parts first: those that come after a large
// sum lose more. `b` has the steps' big parts, then, if it has two, the small ones.
template <int kColumns, int kPartsOfB, int kSteps, int kPartsOfA>
__device__ __forceinline__ void multiply_steps(float (&d)[kColumns / 2],
                                               const Parts<kSteps, kPartsOfA>& a,
                                               const SharedColumns& b) {
  constexpr int kStep = step_bytes(kColumns);
  begin_products();
  if constexpr (kPartsOfB == 2) {
    MGHF_UNROLL_ALL
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (kPartsOfA == 2) {
        multiply_add_later<kColumns>(d, a.of[1][step], b.further(step * kStep));
      }
      multiply_add_later<kColumns>(d, a.of[0][step], b.further((kSteps + step) * kStep));
    }
  }
  MGHF_UNROLL_ALL
  for (int step = 0; step < kSteps; ++step) {
    multiply_add_later<kColumns>(d, a.of[0][step], b.further(step * kStep));
  }
  end_products();
}

// From a thread's sums of the first layer to its hidden units, of two patches.
__device__ __forceinline__ void finish_units(float (&sums)[kUnits / 2], const AfterProducts& after,
                                             int hidden) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  MGHF_UNROLL_ALL
  for (int n = 0; n < kUnits / 4; ++n) {
    const int unit = n / 2 * 8 + 2 * t + n % 2;
    const float back = after.first_back[unit], bias = after.bias1[unit];
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      float& sum = sums[n / 2 * 4 + half * 2 + n % 2];
      const float before = fmaf(sum, back, bias);
      // A NaN must stay one, except in columns without a unit.
      sum = unit >= hidden || before < 0 ? 0.0f : before;
    }
  }
}

// Writes the bits h > 0 of two patches to the state.
__device__ __forceinline__ void write_bits(const float (&units)[kUnits / 2], int* state,
                                           const int64_t (&places)[2], const bool (&exists)[2],
                                           const Patches& p) {
  const int t = static_cast<int>(threadIdx.x) % 4;
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    unsigned own = 0;
    MGHF_UNROLL_ALL
    for (int word = 0; word < kUnits / 32; ++word) {
      unsigned bits = 0;
      MGHF_UNROLL_ALL
      for (int n = 0; n < 8; ++n) {
        if (units[(word * 4 + n / 2) * 4 + half * 2 + n % 2] > 0) bits |= 1u << (n / 2 * 8 + n % 2);
      }
      bits <<= 2 * t;
      bits |= __shfl_xor_sync(kAllLanes, bits, 1);
      bits |= __shfl_xor_sync(kAllLanes, bits, 2);
      if (word == t) own = bits;
    }
    if (exists[half] && 1 + t < p.state_words()) {
      state[places[half] + (1 + t) * p.maps] = static_cast<int>(own);
    }
  }
}

// From the hidden units of two patches to their embeddings.
template <int kParts>
__device__ __forceinline__ void embed(const float (&units)[kUnits / 2], const SharedColumns& second,
                                      const AfterProducts& after, float* embedding, int* state,
                                      const int64_t (&numbers)[2],
                                      const int64_t (&places)[2], const bool (&exists)[2],
                                      const Patches& p) {
  constexpr int kSteps = RowsWeights::second_steps();
  const int t = static_cast<int>(threadIdx.x) % 4;
  Parts<kSteps, kParts> parts;
  float back[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    float largest = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < kUnits / 4; ++n) {
      largest = fmaxf(largest, units[n / 2 * 4 + half * 2 + n % 2]);
    }
    const PowerOfTwo power(largest_of_row(largest));
    back[half] = power.back;
    MGHF_UNROLL_ALL
    for (int n = 0; n < 2 * kSteps; ++n) {
      const float* const two = units + n * 4 + half * 2;
      parts.set(n, half, {two[0] * power.by, two[1] * power.by});
    }
  }
  float y[kOutputs / 2] = {};
  multiply_steps<kOutputs, kParts>(y, parts, second);
  wait_for_products<0>();

  float squares[2] = {};
  MGHF_UNROLL_ALL
  for (int n = 0; n < kOutputs / 4; ++n) {
    const int d = n / 2 * 8 + 2 * t + n % 2;
    const bool is_one = d < p.dimension;
    const float column_back = after.second_back[d], bias = after.bias2[d];
    MGHF_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      float& own = y[n / 2 * 4 + half * 2 + n % 2];
      own = fmaf(own * back[half], column_back, bias);
      // A NaN of the hidden layer is in the columns without an output too.
      if (is_one) squares[half] += own * own;
    }
  }
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 1);
    squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 2);
    const float norm = sqrtf(squares[half]);
    if (!exists[half]) continue;
    if (t == 0) state[places[half]] = bits_as<int>(norm);
    float* const target = embedding + numbers[half] * p.dimension;
    const float factor = 1 / (norm + kNormFloor);
    MGHF_UNROLL_ALL
    for (int n = 0; n < kOutputs / 4; ++n) {
      const int d = n / 2 * 8 + 2 * t + n % 2;
      if (d < p.dimension) target[d] = y[n / 2 * 4 + half * 2 + n % 2] * factor;
    }
  }
}

// Dynamic shared memory: the stages, then the second layer's weights.
template <class T, int kSteps, int kParts>
__global__ void __launch_bounds__(kRowsThreads, 1)
    project_rows(Image<T> x, Patches p, RowsWeights weights, const float* bias1,
                 const float* bias2, float* embedding, int* state, int stages) {
  if (!kWarpgroupProducts) never();
  using Size = Stage<T, kSteps, kParts>;
  using OfRow = RowFactor<kSteps, kPartsOfPixels<T, kParts>>;
  __shared__ RowsControl control;
  MGHF_DYNAMIC_SHARED(unsigned char, memory);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  unsigned char* const second = memory + stages * Size::kBytes;
  const BlockRows block(p, static_cast<int64_t>(blockIdx.x));
  if (thread == 0) {
    for (int slot = 0; slot < stages; ++slot) {
      control.open[slot].begin(1);
      control.free[slot].begin(kGroups * kWarpgroup / kWarp);
    }
    control.second.begin(1);
    control.after_products.begin(1);
    control.rows = block.rows;
  }
  if (thread < block.lines) control.pieces[thread] = block.piece(x, p, thread);
  publish_counters();
  if (warp >= kGroups * 4) {
    leave_registers<kFewRegisters>();
    if (warp == kGroups * 4) {
      copy_rows<kSteps, kParts>(memory, stages, second, control, block, x, weights);
      __syncwarp();  // all pieces are used
      control.after.fill(weights, bias1, bias2, p);
      __syncwarp();
      if (lane == 0) control.after_products.arrive();
    }
    return;
  }
  take_registers<kManyRegisters>();

  int rows[2], places[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    rows[half] = warp * 16 + lane / 4 + 8 * half;
    const int row = rows[half] < block.rows ? rows[half] : block.rows - 1;  // one that there is
    places[half] = block.place(row) + lane % 4 * 4;
  }
  int next = 0, next_parity = 0, slot = 0;
  const auto read_next = [&](OfRow& factor) {
    control.open[next].wait(next_parity);
    factor.read(reinterpret_cast<const T*>(memory + next * Size::kBytes), places);
    if (++next == stages) next = 0, next_parity ^= 1;
  };
  float sums[kUnits / 2] = {};
  // The row of `factor`, and meanwhile the reading of the one after it.
  const auto take_row = [&](const OfRow& factor, OfRow& after, bool more) {
    float d[kUnits / 2] = {};
    multiply_steps<kUnits, kParts>(
        d, factor.parts,
        SharedColumns(memory + slot * Size::kBytes + Size::kPixels, core_bytes_along_depth(kUnits),
                      kCoreBytes));
    if (more) read_next(after);
    wait_for_products<0>();
    __syncwarp();  // all have read the stage
    if (lane == 0) control.free[slot].arrive();
    if (++slot == stages) slot = 0;
    MGHF_UNROLL_ALL
    for (int n = 0; n < kUnits / 2; ++n) sums[n] = fmaf(d[n], factor.back[n / 2 % 2], sums[n]);
  };
  OfRow even, odd;
  read_next(even);
  MGHF_UNROLL(1)
  for (int row = 0; row < block.size; row += 2) {
    take_row(even, odd, true);
    take_row(odd, even, row + 2 < block.size);
  }

  int64_t numbers[2], state_places[2];
  bool exists[2];
  MGHF_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    exists[half] = rows[half] < control.rows;
    numbers[half] = block.first + rows[half];
    const Row row(numbers[half], p.maps, p.of_map(), false);
    state_places[half] = row.item * p.state_words() * p.maps + row.map;
  }
  control.after_products.wait(0);
  finish_units(sums, control.after, p.hidden);
  write_bits(sums, state, state_places, exists, p);
  control.second.wait(0);
  embed<kParts>(sums, SharedColumns(second, core_bytes_along_depth(kOutputs), kCoreBytes),
                control.after, embedding, state, numbers, state_places, exists, p);
}

}  // namespace

}  // namespace mghf::cuda
