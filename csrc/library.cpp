// Operator schemas and registration with torch, over its stable ABI; on CPU, the way from tensors to the kernels.
//
// Shapes and dtypes are checked by the Python function, which can say more about them; what is checked here keeps the
// kernels from reading outside their arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/weights.h"

namespace empcause {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("empcause: ") + what);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// Runs every task in torch's thread pool, so that torch.set_num_threads holds.
void parallel_for(int64_t count, cpu::Task task, void* context) {
  torch::stable::parallel_for(0, count, 1, [task, context](int64_t begin, int64_t end) { task(context, begin, end); });
}

cpu::DType kernel_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return cpu::DType::kFloat32;
    case ScalarType::BFloat16: return cpu::DType::kBFloat16;
    case ScalarType::Half: return cpu::DType::kFloat16;
    default: throw std::runtime_error("empcause: the cpu backend takes float32, bfloat16 and float16");
  }
}

// The kernels read any strides but need whole rows; only other layouts are copied.
Tensor with_whole_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return last < 0 || tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

// [B, H, N, D], or packed [N, H, D].
cpu::Matrices matrices(const Tensor& tensor, bool packed) {
  require(tensor.dim() == (packed ? 3 : 4), "query, key, value and their gradients have 4 dimensions, packed 3");
  if (packed) return {tensor.data_ptr(), 0, tensor.stride(1), tensor.stride(0)};
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

template <class T>
const T* contiguous_data(const OptionalTensor& tensor, ScalarType dtype, int64_t numel, const char* what) {
  if (!tensor.has_value()) return nullptr;
  require(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == numel, what);
  return static_cast<const T*>(tensor->data_ptr());
}

// One call's problem, its weights computed and its arguments checked.
struct Problem {
  cpu::Attention attention{};
  Tensor weight;  // keeps the memory of attention.weight
  int64_t rows, keys;  // of the tensors: per batch, or of all packed sequences
  int64_t outer;       // batch of the tensors: 1 if packed
  bool packed;
};

struct Packing {
  Tensor cu_queries, cu_keys;
  int64_t max_queries, max_keys;
};

void check_prefix_sums(const int32_t* sums, int64_t count, int64_t rows, const char* what) {
  bool fine = sums[0] == 0 && sums[count - 1] == rows;
  for (int64_t i = 1; i < count; ++i) fine = fine && sums[i] >= sums[i - 1];
  require(fine, what);
}

Problem make_problem(Tensor& query, Tensor& key, Tensor& value, const OptionalTensor& cause,
                     double strength, const OptionalTensor& head_strength, const OptionalTensor& key_mask,
                     const std::optional<Packing>& packing, bool causal, double scale, double dropout_p,
                     const OptionalTensor& seed, const OptionalTensor& query_offset) {
  Problem p;
  cpu::Attention& a = p.attention;
  p.packed = packing.has_value();
  query = with_whole_rows(query);
  key = with_whole_rows(key);
  value = with_whole_rows(value);
  a.query = matrices(query, p.packed);
  a.key = matrices(key, p.packed);
  a.value = matrices(value, p.packed);
  const int64_t head_axis = 1, row_axis = p.packed ? 0 : 2, dim_axis = p.packed ? 2 : 3;
  a.num_heads = query.size(head_axis);
  a.num_key_heads = key.size(head_axis);
  a.head_dim = query.size(dim_axis);
  p.rows = query.size(row_axis);
  p.keys = key.size(row_axis);
  p.outer = p.packed ? 1 : query.size(0);
  require(key.size(dim_axis) == a.head_dim && value.size(dim_axis) == a.head_dim && value.size(row_axis) == p.keys &&
              value.size(head_axis) == a.num_key_heads && (p.packed || (key.size(0) == p.outer && value.size(0) == p.outer)),
          "query, key and value do not fit each other");
  require(a.num_key_heads > 0 && a.num_heads % a.num_key_heads == 0, "key heads must divide query heads");
  a.dtype = kernel_dtype(query);
  require(kernel_dtype(key) == a.dtype && kernel_dtype(value) == a.dtype, "query, key and value must share a dtype");

  a.batch = p.outer;
  a.num_queries = p.rows;
  a.num_keys = p.keys;
  if (p.packed) {
    a.batch = packing->cu_queries.numel() - 1;
    require(a.batch >= 0 && packing->cu_keys.numel() == a.batch + 1, "cu_seqlens_q and cu_seqlens_k differ in length");
    a.cu_queries = contiguous_data<int32_t>(packing->cu_queries, ScalarType::Int, a.batch + 1, "cu_seqlens_q is not int32");
    a.cu_keys = contiguous_data<int32_t>(packing->cu_keys, ScalarType::Int, a.batch + 1, "cu_seqlens_k is not int32");
    check_prefix_sums(a.cu_queries, a.batch + 1, p.rows, "cu_seqlens_q must rise from 0 to the number of query rows");
    check_prefix_sums(a.cu_keys, a.batch + 1, p.keys, "cu_seqlens_k must rise from 0 to the number of key rows");
    a.num_queries = a.num_keys = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      a.num_queries = std::max<int64_t>(a.num_queries, a.cu_queries[b + 1] - a.cu_queries[b]);
      a.num_keys = std::max<int64_t>(a.num_keys, a.cu_keys[b + 1] - a.cu_keys[b]);
    }
    require(a.num_queries <= packing->max_queries && a.num_keys <= packing->max_keys,
            "a sequence is longer than max_seqlen_q or max_seqlen_k says");
  }
  a.causal = causal;
  a.bottom_right = !query_offset.has_value();
  a.query_offset = a.bottom_right ? 0 : *contiguous_data<int64_t>(query_offset, ScalarType::Long, 1, "query_offset is not int64");
  a.scale = static_cast<float>(scale);
  a.dropout_p = dropout_p;
  require(dropout_p == 0.0 || seed.has_value(), "dropout needs a seed");
  a.seed = seed.has_value() ? static_cast<uint64_t>(*contiguous_data<int64_t>(seed, ScalarType::Long, 1, "seed is not int64")) : 0;

  cpu::WeightArguments w{};
  w.keys = p.keys;
  w.strength = static_cast<float>(strength);
  w.head_strength = contiguous_data<float>(head_strength, ScalarType::Float, a.num_heads, "head_strength is not float32 [H]");
  w.key_mask = contiguous_data<bool>(key_mask, ScalarType::Bool, p.outer * p.keys, "key_mask is not bool [batch, keys]");
  int64_t cause_heads = 1, cause_outer = 1;
  Tensor cause_float;
  if (cause.has_value()) {
    // [B|1, K], [B|1, H|1, K]; packed [M], [H|1, M]
    const int64_t dims = cause->dim() + (p.packed ? 1 : 0);
    require(dims == 2 || dims == 3, "cause has the wrong number of dimensions");
    cause_outer = p.packed ? 1 : cause->size(0);
    cause_heads = dims == 3 ? cause->size(cause->dim() - 2) : 1;
    require((cause_outer == 1 || cause_outer == p.outer) && (cause_heads == 1 || cause_heads == a.num_heads),
            "cause does not fit batch and heads");
    w.cause = contiguous_data<float>(cause, ScalarType::Float, cause_outer * cause_heads * p.keys,
                                     "cause must be contiguous float32 with one value per key");
    w.cause_head = cause_heads == 1 ? 0 : p.keys;
    w.cause_batch = cause_outer == 1 ? 0 : cause_heads * p.keys;
  }
  w.heads = cause_heads > 1 || (w.head_strength != nullptr && w.cause != nullptr) ? a.num_heads : 1;
  w.batch = cause_outer > 1 || w.key_mask != nullptr ? p.outer : 1;
  p.weight = empty(query, {w.batch, w.heads, p.keys}, ScalarType::Float);
  cpu::compute_weights(w, static_cast<float*>(p.weight.data_ptr()));
  a.weight = {static_cast<float*>(p.weight.data_ptr()), w.batch == 1 ? 0 : w.heads * p.keys, w.heads == 1 ? 0 : p.keys};
  return p;
}

// A new tensor of these rows, laid out so that rows come before heads: [B, N, H, D] seen as [B, H, N, D].
Tensor new_matrices(const Tensor& like, const Problem& p, int64_t rows, int64_t heads) {
  if (p.packed) return empty(like, {rows, heads, p.attention.head_dim}, like.scalar_type());
  Tensor storage = empty(like, {p.outer, rows, heads, p.attention.head_dim}, like.scalar_type());
  return torch::stable::transpose(storage, 1, 2);
}

cpu::Rows logsumexp_rows(const Tensor& logsumexp, const Problem& p) {
  require(logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous() &&
              logsumexp.numel() == p.outer * p.attention.num_heads * p.rows,
          "logsumexp must be contiguous float32 [batch, heads, queries]");
  return {static_cast<float*>(logsumexp.data_ptr()), p.packed ? 0 : p.attention.num_heads * p.rows, p.rows};
}

std::tuple<Tensor, Tensor> run_forward(Problem p, const Tensor& query) {
  cpu::Attention& a = p.attention;
  Tensor output = new_matrices(query, p, p.rows, a.num_heads);
  Tensor logsumexp = p.packed ? empty(query, {a.num_heads, p.rows}, ScalarType::Float)
                              : empty(query, {p.outer, a.num_heads, p.rows}, ScalarType::Float);
  a.output = matrices(output, p.packed);
  a.logsumexp = logsumexp_rows(logsumexp, p);
  cpu::select_kernels().forward(a, parallel_for);
  return {output, logsumexp};
}

// Gradient of cause from the gradient of the weights, summed over what was broadcast in a fixed order.
Tensor reduce_grad_cause(const Problem& p, const Tensor& cause, const Tensor& grad_weight, double strength,
                         const OptionalTensor& head_strength) {
  const int64_t heads = p.attention.num_heads, keys = p.keys;
  const std::vector<int64_t> sizes(cause.sizes().begin(), cause.sizes().end());
  Tensor result = empty(cause, sizes, ScalarType::Float);
  float* out = static_cast<float*>(result.data_ptr());
  for (int64_t i = 0; i < result.numel(); ++i) out[i] = 0.0f;
  const float* in = static_cast<const float*>(grad_weight.data_ptr());
  const float* per_head = head_strength.has_value() ? static_cast<const float*>(head_strength->data_ptr()) : nullptr;
  const int64_t cause_heads = cause.dim() + (p.packed ? 1 : 0) == 3 ? cause.size(cause.dim() - 2) : 1;
  const int64_t cause_outer = p.packed ? 1 : cause.size(0);
  for (int64_t b = 0; b < p.outer; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      const float s = per_head == nullptr ? static_cast<float>(strength) : per_head[h];
      float* row = out + ((cause_outer == 1 ? 0 : b) * cause_heads + (cause_heads == 1 ? 0 : h)) * keys;
      for (int64_t j = 0; j < keys; ++j) row[j] += s * in[(b * heads + h) * keys + j];
    }
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(Problem p, Tensor grad_output, const Tensor& query,
                                                        const Tensor& key, const Tensor& value, Tensor output,
                                                        const Tensor& logsumexp, const OptionalTensor& cause,
                                                        double strength, const OptionalTensor& head_strength,
                                                        const OptionalTensor& key_mask, bool cause_grad) {
  cpu::AttentionBackward g;
  g.forward = p.attention;
  require(kernel_dtype(grad_output) == g.forward.dtype && kernel_dtype(output) == g.forward.dtype,
          "output and grad_output must have query's dtype");
  grad_output = with_whole_rows(grad_output);
  output = with_whole_rows(output);
  g.forward.output = matrices(output, p.packed);
  g.forward.logsumexp = logsumexp_rows(logsumexp, p);
  Tensor grad_query = new_matrices(query, p, p.rows, g.forward.num_heads);
  Tensor grad_key = new_matrices(key, p, p.keys, g.forward.num_key_heads);
  Tensor grad_value = new_matrices(value, p, p.keys, g.forward.num_key_heads);
  g.grad_output = matrices(grad_output, p.packed);
  g.grad_query = matrices(grad_query, p.packed);
  g.grad_key = matrices(grad_key, p.packed);
  g.grad_value = matrices(grad_value, p.packed);
  Tensor grad_weight;
  if (cause_grad) {
    require(cause.has_value(), "cause_grad without cause");
    grad_weight = empty(query, {p.outer, g.forward.num_heads, p.keys}, ScalarType::Float);
    g.grad_weight = {static_cast<float*>(grad_weight.data_ptr()), p.packed ? 0 : g.forward.num_heads * p.keys, p.keys};
    g.key_mask = key_mask.has_value() ? static_cast<const bool*>(key_mask->data_ptr()) : nullptr;
    g.key_mask_batch = p.packed ? 0 : p.keys;
  }
  cpu::select_kernels().backward(g, parallel_for);
  Tensor grad_cause = cause_grad ? reduce_grad_cause(p, *cause, grad_weight, strength, head_strength)
                                 : empty(query, {0}, ScalarType::Float);
  return {grad_query, grad_key, grad_value, grad_cause};
}

std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, OptionalTensor cause, double strength,
                                     OptionalTensor head_strength, OptionalTensor key_mask, bool causal, double scale,
                                     double dropout_p, OptionalTensor seed, OptionalTensor query_offset) {
  return run_forward(make_problem(query, key, value, cause, strength, head_strength, key_mask, std::nullopt, causal, scale,
                                  dropout_p, seed, query_offset),
                     query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, OptionalTensor cause,
    double strength, OptionalTensor head_strength, OptionalTensor key_mask, bool causal, double scale, double dropout_p,
    OptionalTensor seed, OptionalTensor query_offset, bool cause_grad) {
  return run_backward(make_problem(query, key, value, cause, strength, head_strength, key_mask, std::nullopt, causal,
                                   scale, dropout_p, seed, query_offset),
                      grad_output, query, key, value, output, logsumexp, cause, strength, head_strength, key_mask,
                      cause_grad);
}

std::tuple<Tensor, Tensor> attention_varlen(Tensor query, Tensor key, Tensor value, OptionalTensor cause,
                                            double strength, OptionalTensor head_strength, OptionalTensor key_mask,
                                            Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q,
                                            int64_t max_seqlen_k, bool causal, double scale, double dropout_p,
                                            OptionalTensor seed, OptionalTensor query_offset) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return run_forward(make_problem(query, key, value, cause, strength, head_strength, key_mask, packing, causal, scale,
                                  dropout_p, seed, query_offset),
                     query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, OptionalTensor cause,
    double strength, OptionalTensor head_strength, OptionalTensor key_mask, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale, double dropout_p, OptionalTensor seed,
    OptionalTensor query_offset, bool cause_grad) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  return run_backward(make_problem(query, key, value, cause, strength, head_strength, key_mask, packing, causal, scale,
                                   dropout_p, seed, query_offset),
                      grad_output, query, key, value, output, logsumexp, cause, strength, head_strength, key_mask,
                      cause_grad);
}

}  // namespace
}  // namespace empcause

#define EMPCAUSE_INPUTS "Tensor query, Tensor key, Tensor value, "
#define EMPCAUSE_SAVED "Tensor grad_output, " EMPCAUSE_INPUTS "Tensor output, Tensor logsumexp, "
#define EMPCAUSE_WEIGHT "Tensor? cause, float strength, Tensor? head_strength, Tensor? key_mask, "
#define EMPCAUSE_PACKING "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define EMPCAUSE_OPTIONS "bool causal, float scale, float dropout_p, Tensor? seed, Tensor? query_offset"
#define EMPCAUSE_RESULT " -> (Tensor output, Tensor logsumexp)"
#define EMPCAUSE_GRADIENTS ", bool cause_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_cause)"

STABLE_TORCH_LIBRARY(empcause, library) {
  library.def("attention(" EMPCAUSE_INPUTS EMPCAUSE_WEIGHT EMPCAUSE_OPTIONS ")" EMPCAUSE_RESULT);
  library.def("attention_backward(" EMPCAUSE_SAVED EMPCAUSE_WEIGHT EMPCAUSE_OPTIONS EMPCAUSE_GRADIENTS);
  library.def("attention_varlen(" EMPCAUSE_INPUTS EMPCAUSE_WEIGHT EMPCAUSE_PACKING EMPCAUSE_OPTIONS ")" EMPCAUSE_RESULT);
  library.def(
      "attention_varlen_backward(" EMPCAUSE_SAVED EMPCAUSE_WEIGHT EMPCAUSE_PACKING EMPCAUSE_OPTIONS EMPCAUSE_GRADIENTS);
}

STABLE_TORCH_LIBRARY_IMPL(empcause, CPU, library) {
  library.impl("attention", TORCH_BOX(&empcause::attention));
  library.impl("attention_backward", TORCH_BOX(&empcause::attention_backward));
  library.impl("attention_varlen", TORCH_BOX(&empcause::attention_varlen));
  library.impl("attention_varlen_backward", TORCH_BOX(&empcause::attention_varlen_backward));
}
