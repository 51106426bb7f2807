// The raw operators over torch's stable ABI: from tensors to the problem that the kernels solve, the same for every device.
//
// Shapes and dtypes are checked by the Python function, which can say more about them; what is checked here keeps the
// kernels from reading outside their arguments.
//
// A Device is made for one call and has
//   kName                                  for messages
//   Device(like)                           a tensor of the call
//   borrow(tensor)                         told of every tensor whose memory the kernels will use
//   check_packing(attention, packing)      of packed sequences; sets the longest ones
//   compute_weights, reduce_grad_cause     see attention.h
//   forward(attention, like), backward(attention, like)
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"

namespace empcause {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("empcause: ") + what);
}

// On the device of `like`. Past the dispatcher, which would take longer than the kernels do for a few numbers.
template <size_t kDims>
Tensor empty(const Tensor& like, const std::array<int64_t, kDims>& sizes, const std::array<int64_t, kDims>& strides,
             ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(kDims, sizes.data(), strides.data(), dtype_code, device_type, device_index, &made));
  return Tensor(made);
}

template <size_t kDims>
Tensor empty(const Tensor& like, const std::array<int64_t, kDims>& sizes, ScalarType dtype) {
  std::array<int64_t, kDims> strides;
  int64_t stride = 1;
  for (size_t i = kDims; i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return empty(like, sizes, strides, dtype);
}

struct Packing {
  Tensor cu_queries, cu_keys;
  int64_t max_queries, max_keys;
};

template <class Device>
class Operators {
 public:
  static std::tuple<Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value, OptionalTensor cause,
                                              double strength, OptionalTensor head_strength, OptionalTensor key_mask,
                                              bool causal, double scale, double dropout_p, OptionalTensor seed,
                                              OptionalTensor query_offset) {
    Operators call(query, key, value, {cause, strength, head_strength, key_mask}, std::nullopt,
                   {causal, scale, dropout_p, seed, query_offset});
    return call.forward();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
      Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, OptionalTensor cause,
      double strength, OptionalTensor head_strength, OptionalTensor key_mask, bool causal, double scale,
      double dropout_p, OptionalTensor seed, OptionalTensor query_offset, bool cause_grad) {
    Operators call(query, key, value, {cause, strength, head_strength, key_mask}, std::nullopt,
                   {causal, scale, dropout_p, seed, query_offset});
    return call.backward(grad_output, output, logsumexp, cause_grad);
  }

  static std::tuple<Tensor, Tensor> attention_varlen(Tensor query, Tensor key, Tensor value, OptionalTensor cause,
                                                     double strength, OptionalTensor head_strength,
                                                     OptionalTensor key_mask, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
                                                     int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
                                                     double scale, double dropout_p, OptionalTensor seed,
                                                     OptionalTensor query_offset) {
    Operators call(query, key, value, {cause, strength, head_strength, key_mask},
                   Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                   {causal, scale, dropout_p, seed, query_offset});
    return call.forward();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
      Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, OptionalTensor cause,
      double strength, OptionalTensor head_strength, OptionalTensor key_mask, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
      int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal, double scale, double dropout_p, OptionalTensor seed,
      OptionalTensor query_offset, bool cause_grad) {
    Operators call(query, key, value, {cause, strength, head_strength, key_mask},
                   Packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k},
                   {causal, scale, dropout_p, seed, query_offset});
    return call.backward(grad_output, output, logsumexp, cause_grad);
  }

 private:
  struct Bias {
    OptionalTensor cause;
    double strength;
    OptionalTensor head_strength, key_mask;
  };
  struct Options {
    bool causal;
    double scale, dropout_p;
    OptionalTensor seed, query_offset;
  };

  // Checks the arguments, describes the problem in `a` and computes its weights.
  Operators(const Tensor& query, const Tensor& key, const Tensor& value, const Bias& bias,
            const std::optional<Packing>& packing, const Options& options)
      : device_(query), query_(query), packed_(packing.has_value()), bias_(bias) {
    a_.query = matrices(query);
    a_.key = matrices(key);
    a_.value = matrices(value);
    const int64_t head_axis = 1, row_axis = packed_ ? 0 : 2, dim_axis = packed_ ? 2 : 3;
    a_.num_heads = query.size(head_axis);
    a_.num_key_heads = key.size(head_axis);
    a_.head_dim = query.size(dim_axis);
    rows_ = a_.num_queries = a_.total_queries = query.size(row_axis);
    keys_ = a_.num_keys = a_.total_keys = key.size(row_axis);
    outer_ = a_.batch = packed_ ? 1 : query.size(0);
    require(key.size(dim_axis) == a_.head_dim && value.size(dim_axis) == a_.head_dim && value.size(row_axis) == keys_ &&
                value.size(head_axis) == a_.num_key_heads &&
                (packed_ || (key.size(0) == outer_ && value.size(0) == outer_)),
            "query, key and value do not fit each other");
    require(a_.num_key_heads > 0 && a_.num_heads % a_.num_key_heads == 0, "key heads must divide query heads");
    a_.dtype = kernel_dtype(query);
    require(kernel_dtype(key) == a_.dtype && kernel_dtype(value) == a_.dtype, "query, key and value must share a dtype");

    if (packed_) {
      a_.batch = packing->cu_queries.numel() - 1;
      require(a_.batch >= 0 && packing->cu_keys.numel() == a_.batch + 1, "cu_seqlens_q and cu_seqlens_k differ in length");
      a_.cu_queries = contiguous_data<int32_t>(packing->cu_queries, ScalarType::Int, a_.batch + 1, "cu_seqlens_q is not int32");
      a_.cu_keys = contiguous_data<int32_t>(packing->cu_keys, ScalarType::Int, a_.batch + 1, "cu_seqlens_k is not int32");
      device_.check_packing(a_, *packing);
    }
    a_.causal = options.causal;
    a_.query_offset = contiguous_data<int64_t>(options.query_offset, ScalarType::Long, 1, "query_offset is not int64");
    a_.scale = static_cast<float>(options.scale);
    a_.dropout_p = options.dropout_p;
    require(options.dropout_p == 0.0 || options.seed.has_value(), "dropout needs a seed");
    a_.seed = contiguous_data<int64_t>(options.seed, ScalarType::Long, 1, "seed is not int64");
    compute_weights();
  }

  void compute_weights() {
    KeyWeights w{};
    w.keys = keys_;
    w.strength = static_cast<float>(bias_.strength);
    w.head_strength =
        contiguous_data<float>(bias_.head_strength, ScalarType::Float, a_.num_heads, "head_strength is not float32 [H]");
    w.key_mask =
        contiguous_data<bool>(bias_.key_mask, ScalarType::Bool, outer_ * keys_, "key_mask is not bool [batch, keys]");
    if (bias_.cause.has_value()) {
      // [B|1, K], [B|1, H|1, K]; packed [M], [H|1, M]
      const int64_t dims = bias_.cause->dim() + (packed_ ? 1 : 0);
      require(dims == 2 || dims == 3, "cause has the wrong number of dimensions");
      cause_outer_ = packed_ ? 1 : bias_.cause->size(0);
      cause_heads_ = dims == 3 ? bias_.cause->size(bias_.cause->dim() - 2) : 1;
      require((cause_outer_ == 1 || cause_outer_ == outer_) && (cause_heads_ == 1 || cause_heads_ == a_.num_heads),
              "cause does not fit batch and heads");
      w.cause = contiguous_data<float>(bias_.cause, ScalarType::Float, cause_outer_ * cause_heads_ * keys_,
                                       "cause must be contiguous float32 with one value per key");
      w.cause_head = cause_heads_ == 1 ? 0 : keys_;
      w.cause_batch = cause_outer_ == 1 ? 0 : cause_heads_ * keys_;
    }
    w.heads = cause_heads_ > 1 || (w.head_strength != nullptr && w.cause != nullptr) ? a_.num_heads : 1;
    w.batch = cause_outer_ != 1 || w.key_mask != nullptr ? outer_ : 1;
    weight_ = empty<3>(query_, {w.batch, w.heads, keys_}, ScalarType::Float);
    w.weight = data<float>(*weight_);
    device_.compute_weights(w);
    a_.weight = {w.weight, w.batch == 1 ? 0 : w.heads * keys_, w.heads == 1 ? 0 : keys_};
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor output = new_matrices(rows_, a_.num_heads);
    Tensor logsumexp = packed_ ? empty<2>(query_, {a_.num_heads, rows_}, ScalarType::Float)
                               : empty<3>(query_, {outer_, a_.num_heads, rows_}, ScalarType::Float);
    a_.output = matrices(output);
    a_.logsumexp = logsumexp_rows(logsumexp);
    device_.forward(a_, query_);
    return {output, logsumexp};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& output,
                                                      const Tensor& logsumexp, bool cause_grad) {
    require(kernel_dtype(grad_output) == a_.dtype && kernel_dtype(output) == a_.dtype,
            "output and grad_output must have query's dtype");
    for (const Tensor* tensor : {&grad_output, &output}) {
      bool fits = tensor->dim() == query_.dim();
      for (int64_t i = 0; fits && i < query_.dim(); ++i) fits = tensor->size(i) == query_.size(i);
      require(fits, "output and grad_output must have query's shape");
    }
    a_.output = matrices(output);
    a_.logsumexp = logsumexp_rows(logsumexp);
    AttentionBackward g;
    g.forward = a_;
    Tensor grad_query = new_matrices(rows_, a_.num_heads);
    Tensor grad_key = new_matrices(keys_, a_.num_key_heads);
    Tensor grad_value = new_matrices(keys_, a_.num_key_heads);
    g.grad_output = matrices(grad_output);
    g.grad_query = matrices(grad_query);
    g.grad_key = matrices(grad_key);
    g.grad_value = matrices(grad_value);
    std::optional<Tensor> grad_weight;
    if (cause_grad) {
      require(bias_.cause.has_value(), "cause_grad without cause");
      grad_weight = empty<3>(query_, {outer_, a_.num_heads, keys_}, ScalarType::Float);
      g.grad_weight = {data<float>(*grad_weight), packed_ ? 0 : a_.num_heads * keys_, keys_};
      g.key_mask = bias_.key_mask.has_value() ? data<bool>(*bias_.key_mask) : nullptr;
      g.key_mask_batch = packed_ ? 0 : keys_;
    }
    device_.backward(g, query_);
    Tensor grad_cause = cause_grad ? reduce_grad_cause(*grad_weight) : empty<1>(query_, {0}, ScalarType::Float);
    return {grad_query, grad_key, grad_value, grad_cause};
  }

  // Gradient of cause from the gradient of the weights, summed over what was broadcast.
  Tensor reduce_grad_cause(const Tensor& grad_weight) {
    Tensor grad_cause = torch::stable::new_empty(*bias_.cause, bias_.cause->sizes());
    GradCause g{};
    g.batch = outer_;
    g.heads = a_.num_heads;
    g.keys = keys_;
    g.grad_weight = data<float>(grad_weight);
    g.head_strength = bias_.head_strength.has_value() ? data<float>(*bias_.head_strength) : nullptr;
    g.strength = static_cast<float>(bias_.strength);
    g.cause_batch = cause_outer_;
    g.cause_heads = cause_heads_;
    g.grad_cause = data<float>(grad_cause);
    device_.reduce_grad_cause(g);
    return grad_cause;
  }

  static DType kernel_dtype(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      default: throw std::runtime_error("empcause: the " + std::string(Device::kName) + " backend takes float32, bfloat16 and float16");
    }
  }

  // [B, H, N, D], or packed [N, H, D]. The kernels read any strides but need whole rows; only other layouts are copied.
  Matrices matrices(const Tensor& tensor) {
    require(tensor.dim() == (packed_ ? 3 : 4), "query, key, value and their gradients have 4 dimensions, packed 3");
    const int64_t last = tensor.dim() - 1;
    copies_.push_back(tensor.size(last) <= 1 || tensor.stride(last) == 1 ? tensor : torch::stable::contiguous(tensor));
    const Tensor& whole = copies_.back();
    if (packed_) return {data<void>(whole), 0, whole.stride(1), whole.stride(0)};
    return {data<void>(whole), whole.stride(0), whole.stride(1), whole.stride(2)};
  }

  template <class T>
  const T* contiguous_data(const OptionalTensor& tensor, ScalarType dtype, int64_t numel, const char* what) {
    if (!tensor.has_value()) return nullptr;
    require(tensor->scalar_type() == dtype && tensor->is_contiguous() && tensor->numel() == numel, what);
    return data<T>(*tensor);
  }

  template <class T>
  T* data(const Tensor& tensor) {
    device_.borrow(tensor);
    return static_cast<T*>(tensor.data_ptr());
  }

  Rows logsumexp_rows(const Tensor& logsumexp) {
    require(logsumexp.scalar_type() == ScalarType::Float && logsumexp.is_contiguous() &&
                logsumexp.numel() == outer_ * a_.num_heads * rows_,
            "logsumexp must be contiguous float32 [batch, heads, queries]");
    return {data<float>(logsumexp), packed_ ? 0 : a_.num_heads * rows_, rows_};
  }

  // A new tensor of these rows, laid out so that rows come before heads: [B, N, H, D] seen as [B, H, N, D].
  Tensor new_matrices(int64_t rows, int64_t heads) {
    const int64_t dim = a_.head_dim;
    if (packed_) return empty<3>(query_, {rows, heads, dim}, query_.scalar_type());
    return empty<4>(query_, {outer_, heads, rows, dim}, {rows * heads * dim, dim, heads * dim, 1}, query_.scalar_type());
  }

  Device device_;
  Attention a_{};
  Tensor query_;
  bool packed_;
  int64_t rows_, keys_;  // of the tensors: per batch, or of all packed sequences
  int64_t outer_;        // batch of the tensors: 1 if packed
  Bias bias_;
  int64_t cause_outer_ = 1, cause_heads_ = 1;
  // What the pointers in `a_` lead to.
  std::vector<Tensor> copies_;
  std::optional<Tensor> weight_;
};

}  // namespace empcause

#define EMPCAUSE_INPUTS "Tensor query, Tensor key, Tensor value, "
#define EMPCAUSE_SAVED "Tensor grad_output, " EMPCAUSE_INPUTS "Tensor output, Tensor logsumexp, "
#define EMPCAUSE_BIAS "Tensor? cause, float strength, Tensor? head_strength, Tensor? key_mask, "
#define EMPCAUSE_PACKING "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
#define EMPCAUSE_OPTIONS "bool causal, float scale, float dropout_p, Tensor? seed, Tensor? query_offset"
#define EMPCAUSE_RESULT " -> (Tensor output, Tensor logsumexp)"
#define EMPCAUSE_GRADIENTS ", bool cause_grad) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_cause)"

#define EMPCAUSE_DEFINE_OPERATORS(library)                                                                            \
  library.def("attention(" EMPCAUSE_INPUTS EMPCAUSE_BIAS EMPCAUSE_OPTIONS ")" EMPCAUSE_RESULT);                       \
  library.def("attention_backward(" EMPCAUSE_SAVED EMPCAUSE_BIAS EMPCAUSE_OPTIONS EMPCAUSE_GRADIENTS);                \
  library.def("attention_varlen(" EMPCAUSE_INPUTS EMPCAUSE_BIAS EMPCAUSE_PACKING EMPCAUSE_OPTIONS ")" EMPCAUSE_RESULT); \
  library.def("attention_varlen_backward(" EMPCAUSE_SAVED EMPCAUSE_BIAS EMPCAUSE_PACKING EMPCAUSE_OPTIONS EMPCAUSE_GRADIENTS)

#define EMPCAUSE_IMPLEMENT_OPERATORS(library, Device)                                               \
  library.impl("attention", TORCH_BOX(&empcause::Operators<Device>::attention));                    \
  library.impl("attention_backward", TORCH_BOX(&empcause::Operators<Device>::attention_backward));  \
  library.impl("attention_varlen", TORCH_BOX(&empcause::Operators<Device>::attention_varlen));      \
  library.impl("attention_varlen_backward", TORCH_BOX(&empcause::Operators<Device>::attention_varlen_backward))
