// Which kernels run here, and memory for them.
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
  if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&kernels == &kernels_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
#endif
  return &kernels == &kernels_baseline;
}

// Best first.
const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline};

const Kernels& choose() {
  const char* wanted = std::getenv("EMPCAUSE_CPU_ISA");
  std::string known;
  for (const Kernels* kernels : kAll) {
    if (wanted == nullptr || *wanted == '\0') {
      if (runs_here(*kernels)) return *kernels;
    } else if (std::strcmp(wanted, kernels->isa) == 0) {
      if (runs_here(*kernels)) return *kernels;
      throw std::runtime_error("EMPCAUSE_CPU_ISA is " + std::string(wanted) + ", which this processor does not run");
    }
    known += std::string(known.empty() ? "" : ", ") + kernels->isa;
  }
  throw std::runtime_error("EMPCAUSE_CPU_ISA is " + std::string(wanted) + "; expected one of " + known);
}

}  // namespace

const Kernels& select_kernels() {
  static const Kernels& selected = choose();
  return selected;
}

float* thread_scratch(int64_t num_floats) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local int64_t capacity = 0;
  if (num_floats > capacity) {
    const auto bytes = (static_cast<size_t>(num_floats) * sizeof(float) + 63) / 64 * 64;
    memory.reset();
    capacity = 0;
    memory.reset(std::aligned_alloc(64, bytes));
    if (!memory) throw std::bad_alloc();
    capacity = num_floats;
  }
  return static_cast<float*>(memory.get());
}

}  // namespace empcause::cpu
