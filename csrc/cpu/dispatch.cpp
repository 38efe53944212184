#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef MGHF_X86_KERNELS
#include <cpuid.h>
#endif

#include <torch/csrc/stable/ops.h>

namespace mghf {
namespace {

#ifdef MGHF_X86_KERNELS
// Whether the CPU has AMX tiles and their bfloat16 products, and the system allows them.
bool has_amx() {
#if defined(MGHF_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((edx & bf16) == 0 || (edx & tile) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

CpuCapability best_capability() {
#ifdef MGHF_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) {
    return has_amx() ? CpuCapability::amx : CpuCapability::avx512_bf16;
  }
  if (avx2 && avx512) return CpuCapability::avx512;
  if (avx2) return CpuCapability::avx2;
#endif
  return CpuCapability::default_;
}

CpuCapability capped_capability() {
  const CpuCapability best = best_capability();
  const char* variable = std::getenv("MGHF_CPU_CAPABILITY");
  if (variable == nullptr || *variable == '\0') return best;
  for (const auto cap : {CpuCapability::default_, CpuCapability::avx2, CpuCapability::avx512,
                         CpuCapability::avx512_bf16, CpuCapability::amx}) {
    if (std::string(variable) == name(cap)) return std::min(best, cap);
  }
  STD_TORCH_CHECK(false, "environment variable MGHF_CPU_CAPABILITY is '", variable,
                  "'; allowed are 'default', 'avx2', 'avx512', 'avx512_bf16', 'amx'");
}

}  // namespace

CpuCapability cpu_capability() {
  static const CpuCapability capability = capped_capability();
  return capability;
}

const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::amx: return "amx";
    case CpuCapability::avx512_bf16: return "avx512_bf16";
    case CpuCapability::avx512: return "avx512";
    case CpuCapability::avx2: return "avx2";
    default: return "default";
  }
}

void for_each(int64_t count, size_t workspace_bytes,
              const std::function<void(int64_t index, void* workspace)>& task) {
  constexpr std::align_val_t alignment{64};
  const auto release = [](void* p) { ::operator delete(p, alignment); };
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  // Threads take matrices one by one, because some need many more operations than others.
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      std::unique_ptr<void, decltype(release)> workspace(
          ::operator new(workspace_bytes, alignment), release);
      for (int64_t i = next++; i < count; i = next++) task(i, workspace.get());
    }
  });
}

void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  // Failing is no error: small pages work as well.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mghf
