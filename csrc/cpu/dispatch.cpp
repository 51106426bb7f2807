// Selects the unit that runs on this processor, and allocates memory for the kernels.
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

#include "kernels.h"
#include "limits.h"

namespace empcause::cpu {

namespace {

bool any_processor() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() {
#if defined(EMPCAUSE_BF16_STAND_IN)
  return has_avx2();
#else
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}
#endif

// What is compiled for one instruction set, and whether this processor runs it.
struct Unit {
  const Kernels& kernels;
  const Limits& limits;
  bool (*runs_here)();
};

// The fastest comes first.
const Unit kUnits[] = {
#if defined(__x86_64__)
    {kernels_avx512_bf16, limits_avx512_bf16, has_avx512_bf16},
    {kernels_avx512, limits_avx512, has_avx512},
    {kernels_avx2, limits_avx2, has_avx2},
#endif
    {kernels_baseline, limits_baseline, any_processor},
};

const Unit& choose() {
  const char* wanted = std::getenv("EMPCAUSE_CPU_ISA");
  std::string usable;
  for (const Unit& unit : kUnits) {
    if (!unit.runs_here()) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, unit.kernels.isa) == 0) return unit;
    usable += std::string(usable.empty() ? "" : ", ") + unit.kernels.isa;
  }
  throw std::runtime_error("EMPCAUSE_CPU_ISA is " + std::string(wanted) + "; this processor runs " + usable);
}

const Unit& selected() {
  static const Unit& unit = choose();
  return unit;
}

}  // namespace

const Kernels& select_kernels() { return selected().kernels; }

const Limits& select_limits() { return selected().limits; }

Memory::Memory(int64_t num_floats) : data(num_floats == 0 ? nullptr : new float[static_cast<size_t>(num_floats)]) {}

Memory::~Memory() { delete[] data; }

float* thread_scratch(int64_t num_floats) {
  // The rows of strided tensors lie on many pages and fill the TLB, so scratch memory uses large pages
  // and few of its entries.
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
    madvise(memory.get(), pages, MADV_HUGEPAGE);  // only a hint: an error is ignored
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  // The sanitizer reports accesses beyond the memory that this call requested.
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), bytes);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(memory.get()) + bytes, capacity - bytes);
#endif
  return static_cast<float*>(memory.get());
}

}  // namespace empcause::cpu
