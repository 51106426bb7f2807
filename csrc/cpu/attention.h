// What the CPU kernels compute, in plain C++: raw pointers, strides in elements, an injected parallel-for.
//
//   x_ij = scale * q_i . k_j          for keys j <= i + query_offset, if causal
//   b_ij = w_j exp(x_ij - LSE_i)      LSE_i = log sum_j w_j exp(x_ij)
//   o_i  = sum_j Z_ij b_ij v_j        Z_ij the dropout factor, 0 or 1 / (1 - p)
#pragma once

#include <cstdint>

namespace empcause::cpu {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// A [batch, heads, rows, head_dim] tensor; the last dimension is contiguous. Packed tensors have batch stride 0.
struct Matrices {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// A contiguous-in-rows fp32 quantity per [batch, head, row].
struct Rows {
  float* data = nullptr;
  int64_t batch = 0, head = 0;
};

struct Attention {
  int64_t batch, num_heads, num_key_heads, head_dim;
  // Lengths: of every sequence, or prefix sums [batch + 1] over the rows of packed sequences.
  int64_t num_queries, num_keys;
  const int32_t* cu_queries = nullptr;
  const int32_t* cu_keys = nullptr;
  bool causal;
  bool bottom_right;     // the last query sees the last key; otherwise query_offset holds
  int64_t query_offset;  // position of query 0 among the keys
  float scale;
  double dropout_p;
  uint64_t seed;
  DType dtype;
  Matrices query, key, value, output;
  Rows weight;     // w_j; 0 takes the key out
  Rows logsumexp;  // +infinity where a row has no key
};

struct AttentionBackward {
  Attention forward;
  Matrices grad_output, grad_query, grad_key, grad_value;
  // Per query head; summed over what was broadcast by the caller. Null where grad_cause is not asked for.
  Rows grad_weight;
  const bool* key_mask = nullptr;  // [batch, keys]; grad_weight is wanted where it holds, also where the weight is 0
  int64_t key_mask_batch = 0;
};

// Runs task(context, begin, end) over ranges that cover [0, count).
using Task = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, Task task, void* context);

struct Kernels {
  const char* isa;
  void (*forward)(const Attention&, ParallelFor);
  void (*backward)(const AttentionBackward&, ParallelFor);
};

// The kernels of one instruction set: one translation unit each.
extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// The best kernels this processor runs, or those that EMPCAUSE_CPU_ISA names.
// Throws std::runtime_error where that is unknown or does not run here.
const Kernels& select_kernels();

// Scratch memory of the calling thread, 64-byte aligned, kept between calls; contents are undefined.
float* thread_scratch(int64_t num_floats);

// The queries and keys of one sequence.
struct Sequence {
  int64_t query_begin, num_queries, key_begin, num_keys, offset;
};

inline Sequence sequence(const Attention& a, int64_t batch) {
  Sequence s{0, a.num_queries, 0, a.num_keys, a.query_offset};
  if (a.cu_queries != nullptr) {
    s.query_begin = a.cu_queries[batch];
    s.num_queries = a.cu_queries[batch + 1] - s.query_begin;
    s.key_begin = a.cu_keys[batch];
    s.num_keys = a.cu_keys[batch + 1] - s.key_begin;
  }
  if (a.bottom_right) s.offset = s.num_keys - s.num_queries;
  return s;
}

}  // namespace empcause::cpu
