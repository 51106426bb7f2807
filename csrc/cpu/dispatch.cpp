// Which kernels run here, and memory for them.
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "attention.h"

namespace empcause::cpu {

namespace {

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&kernels == &kernels_avx2) return avx2;
  if (&kernels == &kernels_avx512) return avx512;
#if defined(EMPCAUSE_BF16_STAND_IN)
  if (&kernels == &kernels_avx512_bf16) return avx2;
#else
  if (&kernels == &kernels_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
  return &kernels == &kernels_baseline;
}

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline};

const Kernels& choose() {
  const char* wanted = std::getenv("EMPCAUSE_CPU_ISA");
  std::string usable;
  for (const Kernels* kernels : kAll) {
    if (!runs_here(*kernels)) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, kernels->isa) == 0) return *kernels;
    usable += std::string(usable.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::runtime_error("EMPCAUSE_CPU_ISA is " + std::string(wanted) + "; this processor runs " + usable);
}

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& selected = choose();
  return selected;
}

float* thread_scratch(int64_t num_floats) {
  // Strided rows of tensors lie on many pages and fill the TLB: the scratch memory should need few of its entries.
  constexpr size_t kLargePage = size_t{1} << 21;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  const size_t bytes = static_cast<size_t>(num_floats) * sizeof(float);
  if (bytes > capacity) {
    const size_t pages = (bytes + kLargePage - 1) / kLargePage * kLargePage;
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(kLargePage, pages));
    if (!memory) throw std::bad_alloc();
    capacity = pages;
#if defined(__linux__)
    madvise(memory.get(), pages, MADV_HUGEPAGE);  // may be declined
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  // What is beyond this call's part is out of bounds.
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory.get()) + bytes, capacity - bytes);
#endif
  return static_cast<float*>(memory.get());
}

}  // namespace empcause::cpu
