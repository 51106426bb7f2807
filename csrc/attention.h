// The problem that the kernels solve, on the CPU and on GPUs, as raw pointers and strides in elements.
//
//   x_ij = scale * q_i . k_j          for keys j <= i + query_offset, if causal
//   b_ij = w_j exp(x_ij - LSE_i)      LSE_i = log sum_j w_j exp(x_ij)
//   o_i  = sum_j Z_ij b_ij v_j        Z_ij the dropout factor, 0 or 1 / (1 - p)
//
// The forward pass stores LSE in two parts, so that neither loses digits to the other: `maximum`,
// where the terms of a row are divided by 2^maximum, and `total`, the sum of these terms. The backward
// pass computes the same terms from the same numbers, so its probabilities sum to 1 however large the
// logits are. On a GPU LSE is stored as cuda/logsumexp.h describes.
#pragma once

#include <cstdint>

// Marks every function of this header: each unit has its own copy, as the CPU's units must not share a
// function (cpu/isa.h).
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

// One fp32 value per [batch, head, row]; the values of neighbouring rows are contiguous.
struct Rows {
  float* data = nullptr;
  int64_t batch = 0, head = 0;

  EMPCAUSE_EVERYWHERE float* of(int64_t b, int64_t h) const { return data + b * batch + h * head; }
};

// The forward pass. Every pointer, also those to single numbers, leads to memory of the device that
// computes, so that the host never waits for a GPU.
struct Attention {
  int64_t batch, num_heads, num_key_heads, head_dim;
  int64_t num_queries, num_keys;      // of every sequence; if packed, of the longest one
  int64_t total_queries, total_keys;  // rows of the tensors per batch; if packed, of all sequences together
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
  // int16: the fp32 output before it was rounded to bf16 or fp16, minus the rounded output, in units of
  // fp32's last place. Its data may be null.
  Matrices rounding;
  Rows weight;          // w_j; a key of weight 0 is not attended to. On a GPU its data is null if all are 1
  Rows maximum, total;  // LSE_i = ln 2 * maximum_i + log total_i; a row without a key has total 0
};

// The backward pass of a forward pass.
struct AttentionBackward {
  Attention forward;
  Matrices grad_output, grad_query, grad_key, grad_value;
  // The gradient of the weights for every query head; the caller sums it over broadcast dimensions. Its
  // data is null where grad_cause is not needed.
  Rows grad_weight;
  // [batch, keys], or null: grad_weight is computed for the keys that it marks, also for those of weight 0.
  const bool* key_mask = nullptr;
  int64_t key_mask_batch = 0;
};

// The arguments of compute_weights: w_j = key_mask_j * (1 + strength * cause_j), contiguous [batch, heads, keys].
struct KeyWeights {
  int64_t batch, heads, keys;            // sizes of `weight`
  const float* cause = nullptr;          // null: all weights are 0 or 1
  int64_t cause_batch, cause_head;       // strides of `cause`, 0 where it is broadcast; its keys are contiguous
  const float* head_strength = nullptr;  // [heads], or null: `strength` holds for all heads
  float strength;
  const bool* key_mask = nullptr;  // [batch, keys], or null: all keys
  float* weight;
};

// The arguments of reduce_grad_cause: grad_cause, contiguous [batch or 1, heads or 1, keys], from the gradient of the
// weights [batch, heads, keys].
struct GradCause {
  int64_t batch, heads, keys;
  const float* grad_weight;
  const float* head_strength = nullptr;
  float strength;
  int64_t cause_batch, cause_heads;  // sizes of grad_cause; the gradient is summed over a dimension that is 1 here only
  float* grad_cause;
};

// Weights from here to 0 count as 0: rounding may leave a weight that is meant as 0 slightly below it.
constexpr float kSmallestWeight = -1e-6f;

constexpr float kLog2E = 1.4426950408889634f;

// e = exp(x - LSE) may overflow for a key of weight 0, where only the gradient of the weight uses it.
// Every backend caps x - LSE at 80 there; this is the cap in base 2.
constexpr float kLargestExponent = 80.0f * kLog2E;

// The rows of queries and keys of one sequence. Query i has the position i + offset among the keys.
struct Sequence {
  int64_t query_begin, num_queries, key_begin, num_keys, offset;
};

EMPCAUSE_EVERYWHERE static inline int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// Returns sequence `batch`. Prefix sums in memory of a GPU cannot be checked without waiting for it,
// so those that do not fit the tensors are clamped: no kernel accesses memory outside of the tensors.
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
