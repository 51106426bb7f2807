// What the kernels compute, on the CPU and on GPUs, in plain C++: raw pointers and strides in elements.
//
//   x_ij = scale * q_i . k_j          for keys j <= i + query_offset, if causal
//   b_ij = w_j exp(x_ij - LSE_i)      LSE_i = log sum_j w_j exp(x_ij)
//   o_i  = sum_j Z_ij b_ij v_j        Z_ij the dropout factor, 0 or 1 / (1 - p)
//
// The forward pass leaves LSE in two parts, each with all its digits: 2^maximum, which a row's terms are relative to, and their sum.
// The backward pass makes the same terms of the same numbers, so its probabilities sum to 1 however large the logits are. On a GPU
// LSE has the form of cuda/logsumexp.h.
#pragma once

#include <cstdint>

// Of every function of this header, which every unit has for itself: the CPU's units must not share one (cpu/isa.h).
#if defined(__CUDACC__)
#define EMPCAUSE_EVERYWHERE __host__ __device__
#else
#define EMPCAUSE_EVERYWHERE [[gnu::always_inline]]
#endif

namespace empcause {

enum class DType { kFloat32, kBFloat16, kFloat16 };

// A [batch, heads, rows, head_dim] tensor; the last dimension is contiguous. Packed tensors have batch stride 0.
struct Matrices {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  EMPCAUSE_EVERYWHERE int64_t offset(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

// A contiguous-in-rows fp32 quantity per [batch, head, row].
struct Rows {
  float* data = nullptr;
  int64_t batch = 0, head = 0;

  EMPCAUSE_EVERYWHERE float* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// Every pointer leads to memory of the device that computes, so that nobody waits for a GPU to read a number.
struct Attention {
  int64_t batch, num_heads, num_key_heads, head_dim;
  int64_t num_queries, num_keys;      // of every sequence; of the longest one if packed
  int64_t total_queries, total_keys;  // rows of the tensors per batch; of all sequences together if packed
  // Prefix sums [batch + 1] over the rows of packed sequences; null otherwise.
  const int32_t* cu_queries = nullptr;
  const int32_t* cu_keys = nullptr;
  bool causal;
  const int64_t* query_offset = nullptr;  // position of query 0 among the keys; null: the last query sees the last key
  float scale;
  double dropout_p;
  const int64_t* seed = nullptr;  // null without dropout
  DType dtype;
  Matrices query, key, value, output;
  // int16: the output before it was rounded to bf16 or fp16, less the output, in units of fp32's last place; may be null.
  Matrices rounding;
  Rows weight;          // w_j; 0 takes the key out
  Rows maximum, total;  // LSE_i = ln 2 * maximum_i + log total_i; a row without a key has total 0
};

struct AttentionBackward {
  Attention forward;
  Matrices grad_output, grad_query, grad_key, grad_value;
  // Per query head; summed over what was broadcast by the caller. Null where grad_cause is not asked for.
  Rows grad_weight;
  const bool* key_mask = nullptr;  // [batch, keys]; grad_weight is wanted where it holds, also where the weight is 0
  int64_t key_mask_batch = 0;
};

// Key weights w_j = key_mask_j * (1 + strength * cause_j) to be computed, contiguous [batch, heads, keys].
struct KeyWeights {
  int64_t batch, heads, keys;            // of the result
  const float* cause = nullptr;          // null: all weights are 0 or 1
  int64_t cause_batch, cause_head;       // strides; keys are contiguous
  const float* head_strength = nullptr;  // [heads], or null: `strength` for all
  float strength;
  const bool* key_mask = nullptr;  // [batch, keys], or null: all keys
  float* weight;
};

// grad_cause, contiguous [batch or 1, heads or 1, keys], from the gradient of the weights [batch, heads, keys].
struct GradCause {
  int64_t batch, heads, keys;
  const float* grad_weight;
  const float* head_strength = nullptr;
  float strength;
  int64_t cause_batch, cause_heads;  // sizes of grad_cause: what is 1 there was broadcast
  float* grad_cause;
};

// Rounding may leave a weight meant as 0 slightly below it.
constexpr float kSmallestWeight = -1e-6f;

// The queries and keys of one sequence.
struct Sequence {
  int64_t query_begin, num_queries, key_begin, num_keys, offset;
};

EMPCAUSE_EVERYWHERE static inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Prefix sums that do not fit the tensors, which cannot be refused without waiting for a GPU, never lead outside them.
EMPCAUSE_EVERYWHERE static inline Sequence sequence(const Attention& a, int64_t batch) {
  Sequence s{0, a.num_queries, 0, a.num_keys, 0};
  if (a.cu_queries != nullptr) {
    s.query_begin = clamped(a.cu_queries[batch], 0, a.total_queries);
    s.num_queries = clamped(a.cu_queries[batch + 1] - s.query_begin, 0, a.total_queries - s.query_begin);
    s.key_begin = clamped(a.cu_keys[batch], 0, a.total_keys);
    s.num_keys = clamped(a.cu_keys[batch + 1] - s.key_begin, 0, a.total_keys - s.key_begin);
  }
  s.offset = a.query_offset == nullptr ? s.num_keys - s.num_queries : *a.query_offset;
  return s;
}

}  // namespace empcause
