// Shared by the CPU kernels: the choice of the instruction set, threads, memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace mghf {

// Each includes those before it; the last two add products of bfloat16.
enum class CpuCapability { default_, avx2, avx512, avx512_bf16, amx };

// The best set that this CPU has and this library was built for, at most that of the environment
// variable MGHF_CPU_CAPABILITY = default | avx2 | avx512 | avx512_bf16 | amx. Any other value
// throws. Decided at the first call.
CpuCapability cpu_capability();
const char* name(CpuCapability);

// This machine's table of an op's kernels, of the tables <op>_default, <op>_avx2, <op>_avx512; and,
// for ops with products of bfloat16, <op>_avx512_bf16 and <op>_amx.
#ifdef MGHF_X86_KERNELS
#define MGHF_KERNELS_OF(op)                                                          \
  (::mghf::cpu_capability() >= ::mghf::CpuCapability::avx512  ? ::mghf::op##_avx512 \
   : ::mghf::cpu_capability() == ::mghf::CpuCapability::avx2 ? ::mghf::op##_avx2    \
                                                             : ::mghf::op##_default)
#define MGHF_BFLOAT16_KERNELS_OF(op)                                                            \
  (::mghf::cpu_capability() == ::mghf::CpuCapability::amx           ? ::mghf::op##_amx         \
   : ::mghf::cpu_capability() == ::mghf::CpuCapability::avx512_bf16 ? ::mghf::op##_avx512_bf16 \
                                                                    : MGHF_KERNELS_OF(op))
#else
#define MGHF_KERNELS_OF(op) (::mghf::op##_default)
#define MGHF_BFLOAT16_KERNELS_OF(op) (::mghf::op##_default)
#endif

// Calls task(index, workspace) for every index below count, on PyTorch's threads. A workspace is
// 64-byte aligned, uninitialised and used by one task at a time.
void for_each(int64_t count, size_t workspace_bytes,
              const std::function<void(int64_t index, void* workspace)>& task);

// Asks the system to back fresh memory with 2 MiB pages where it offers them. The first touch of
// every 4 KiB page otherwise costs as much time as the kernels themselves.
void use_huge_pages(void* data, size_t bytes);

}  // namespace mghf
