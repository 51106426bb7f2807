// What the machine can do at most: the yardsticks that benchmarks hold the kernels against. The operator does without them.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// The loops of one instruction set, compiled from limits.cpp.
struct Limits {
  // Runs independent chains of multiply-adds in registers, as many as the matrix products have accumulators and of such
  // operands as theirs for a dtype; returns the FLOPs done.
  int64_t (*multiply_adds)(DType dtype, int64_t rounds);
  // Reads an array once, as fast as memory gives it, which is from two places at a time; returns the sum of its values.
  float (*read_all)(const float* data, int64_t count);
};

extern const Limits limits_baseline;
extern const Limits limits_avx2;
extern const Limits limits_avx512;
extern const Limits limits_avx512_bf16;

// Those of the instruction set of select_kernels(), which throws what that throws.
const Limits& select_limits();

}  // namespace empcause::cpu
