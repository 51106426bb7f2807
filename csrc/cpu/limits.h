// Upper limits of the machine, which benchmarks compare the kernels with: multiply-adds per second and
// memory bandwidth. The operator does not use them.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// The measuring loops of one instruction set, compiled from limits.cpp.
struct Limits {
  // Runs independent chains of multiply-adds in registers and returns the number of FLOPs done. There are as
  // many chains as the matrix products have accumulators, with the operands that these use for the dtype.
  int64_t (*multiply_adds)(DType dtype, int64_t rounds);
  // Reads an array once and returns the sum of its values. It reads both halves at once, which is how
  // memory is fastest.
  float (*read_all)(const float* data, int64_t count);
};

extern const Limits limits_baseline;
extern const Limits limits_avx2;
extern const Limits limits_avx512;
extern const Limits limits_avx512_bf16;

// Returns the loops of the instruction set that select_kernels() chooses; throws what that throws.
const Limits& select_limits();

}  // namespace empcause::cpu
