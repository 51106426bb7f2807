// The operator on the CPU, for callers in C++, who pass a problem (../attention.h) and a parallel for
// loop of their own.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// A ParallelFor runs task(context, index, next) for every index in [0, count). `next` is the index that the thread is
// likely to run afterwards, or -1; tasks prefetch its rows.
using Task = void (*)(void* context, int64_t index, int64_t next);
using ParallelFor = void (*)(int64_t count, Task task, void* context);

// The kernels of one instruction set. Each is a unit of its own, compiled from kernels.cpp.
struct Kernels {
  const char* isa;
  // Whether products of bf16 tensors multiply bf16 values, to which probabilities and gradients of
  // logits are then rounded.
  bool multiplies_bfloat16;
  void (*forward)(const Attention&, ParallelFor);
  void (*backward)(const AttentionBackward&, ParallelFor);
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;

// Returns the fastest kernels that this processor runs, or those that the environment variable EMPCAUSE_CPU_ISA names.
// Throws std::runtime_error where these are unknown or do not run on this processor.
const Kernels& select_kernels();

// Returns scratch memory of the calling thread, aligned to a large page. It is kept between calls; its
// contents are undefined.
float* thread_scratch(int64_t num_floats);

// Memory of one call, whose contents are undefined. Kernels use it instead of std::vector, as units
// would share the functions of the standard library (isa.h).
struct Memory {
  float* const data;  // null if num_floats is 0

  explicit Memory(int64_t num_floats);
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory();
};

}  // namespace empcause::cpu
