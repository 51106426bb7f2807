// The operator on the CPU, for callers in C++: the problem of ../attention.h, and a parallel-for of the caller's.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// Runs task(context, index, next) for every index in [0, count). `next` is the task that the thread is likely to take
// then, or -1.
using Task = void (*)(void* context, int64_t index, int64_t next);
using ParallelFor = void (*)(int64_t count, Task task, void* context);

// The kernels of one instruction set: one unit each, compiled from kernels.cpp.
struct Kernels {
  const char* isa;
  bool has_pairs;  // bf16 is multiplied in pairs, for which probabilities and gradients of logits are rounded to it
  void (*forward)(const Attention&, ParallelFor);
  void (*backward)(const AttentionBackward&, ParallelFor);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

// The best kernels this processor runs, or those that EMPCAUSE_CPU_ISA names.
// Throws std::runtime_error where that is unknown or does not run here.
const Kernels& select_kernels();

// Scratch memory of the calling thread, aligned to a large page, kept between calls; contents are undefined.
float* thread_scratch(int64_t num_floats);

// Memory of one call; contents are undefined. It takes the place of the standard library's, whose functions units would
// share (isa.h).
struct Memory {
  float* const data;  // null where there are no floats

  explicit Memory(int64_t num_floats);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();
};

}  // namespace empcause::cpu
