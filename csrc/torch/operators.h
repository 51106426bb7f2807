// The raw operators over torch's stable ABI, for every device: they check the tensors and turn them
// into the problem that the kernels solve.
//
// Anybody can call the raw operators, so everything that the kernels assume about their arguments is checked here
// (arguments.h): nothing outside of the arguments is ever read or written.
//
// The class template Operators has a parameter Device, an object of which lives for one call:
//   Device::takes(tensor)                whether its kernels can read the tensor
//   Device::kName                        the name of the backend, for messages
//   Device::kLosslessStatistics          whether its forward pass stores LSE in two parts, and the rounding of the
//                                        output, for bf16 and fp16, too
//   Device::kOnesAreNull                 whether its kernels take null in the place of weights that are all 1
//   Device(like)                         is constructed from a tensor of the call
//   borrow(tensor)                       is called with every tensor whose memory the kernels use
//   check_packing(attention, longest_query, longest_key)
//                                        checks packed sequences, whose lengths have these bounds, and sets
//                                        num_queries and num_keys
//   compute_weights(arguments), reduce_grad_cause(arguments)
//                                        run the kernels of attention.h's KeyWeights and GradCause
//   forward(attention, like), backward(attention, like)
//                                        run the passes; `like` is a tensor on the device
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "../attention.h"
#include "arguments.h"

namespace empcause {

// Returns an uninitialised tensor on the device of `like`. It calls the C shim directly, as the
// dispatcher would take longer than the kernels take for a small problem.
template <size_t kDims>
Tensor empty(const Tensor& like, const std::array<int64_t, kDims>& sizes, const std::array<int64_t, kDims>& strides,
             ScalarType dtype) {
  int32_t device_type = 0, device_index = 0;
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(
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

// The arguments that both passes have, by reference to those of the call.
struct Problem {
  const Tensor &query, &key, &value;  // [B, H, Q, D], [B, Hkv, K, D] twice; packed [N, H, D], [M, Hkv, D] twice
  const OptionalTensor& cause;
  double strength;
  const OptionalTensor &head_strength, &key_mask;
  const OptionalTensor &cu_seqlens_q, &cu_seqlens_k;  // both for packed sequences, else neither
  int64_t max_seqlen_q, max_seqlen_k;                 // bounds of the sequences' lengths if packed, else 0
  bool causal;
  double scale, dropout_p;
  const OptionalTensor &seed, &query_offset;
};

template <class Device>
class Operators {
 public:
  // Returns the output; its rounding, which is empty where it is not stored; the statistics, which are the parts of
  // LSE; and the weights of the keys as the device's kernels take them.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention(Tensor query, Tensor key, Tensor value,
                                                              OptionalTensor cause, double strength,
                                                              OptionalTensor head_strength, OptionalTensor key_mask,
                                                              OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
                                                              int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
                                                              double scale, double dropout_p, OptionalTensor seed,
                                                              OptionalTensor query_offset, bool for_backward) {
    Operators call({query, key, value, cause, strength, head_strength, key_mask, cu_seqlens_q, cu_seqlens_k,
                    max_seqlen_q, max_seqlen_k, causal, scale, dropout_p, seed, query_offset});
    return call.forward(for_backward);
  }

  // Returns the gradients of query, key, value and cause; the last one is empty unless `cause_grad`.
  static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
      Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor rounding, Tensor statistics,
      Tensor weights, OptionalTensor cause, double strength, OptionalTensor head_strength, OptionalTensor key_mask,
      OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, bool causal,
      double scale, double dropout_p, OptionalTensor seed, OptionalTensor query_offset, bool cause_grad) {
    Operators call({query, key, value, cause, strength, head_strength, key_mask, cu_seqlens_q, cu_seqlens_k,
                    max_seqlen_q, max_seqlen_k, causal, scale, dropout_p, seed, query_offset});
    return call.backward(grad_output, output, rounding, statistics, weights, cause_grad);
  }

 private:
  // Checks the arguments and describes the problem in `a_` and `weights_`.
  explicit Operators(const Problem& problem)
      : arguments_(problem.query),
        device_(on_device(problem.query)),
        problem_(problem),
        query_(problem.query),
        dtype_(problem.query.scalar_type()),
        packed_(problem.cu_seqlens_q.has_value()) {
    require(packed_ == problem.cu_seqlens_k.has_value(),
            "cu_seqlens_q and cu_seqlens_k come together: pass both or neither");
    check_shapes(problem.key, problem.value);
    a_.query = matrices(query_);
    a_.key = matrices(problem.key);
    a_.value = matrices(problem.value);

    const int64_t longest_query = problem.max_seqlen_q, longest_key = problem.max_seqlen_k;
    if (packed_) {
      const Tensor &cu_queries = *problem.cu_seqlens_q, &cu_keys = *problem.cu_seqlens_k;
      const int64_t sums = cu_queries.numel();
      require(sums > 0, "cu_seqlens_q must have a number per sequence and one more, but is empty");
      a_.batch = sums - 1;
      arguments_.check_contiguous("cu_seqlens_q", cu_queries, ScalarType::Int, {sums});
      arguments_.check_contiguous("cu_seqlens_k", cu_keys, ScalarType::Int, {sums});
      require(longest_query >= 0 && longest_key >= 0, "max_seqlen_q and max_seqlen_k must not be negative");
      a_.cu_queries = data<int32_t>(cu_queries);
      a_.cu_keys = data<int32_t>(cu_keys);
      device_.check_packing(a_, longest_query, longest_key);
    } else {
      require(longest_query == 0 && longest_key == 0,
              "max_seqlen_q and max_seqlen_k must be 0 without cu_seqlens_q and cu_seqlens_k");
    }
    a_.causal = problem.causal;
    arguments_.check_number("query_offset", problem.query_offset);
    a_.query_offset = optional_data<int64_t>(problem.query_offset);
    a_.scale = static_cast<float>(problem.scale);
    require(std::isfinite(a_.scale), "scale must be finite in fp32");
    a_.dropout_p = problem.dropout_p;
    require(a_.dropout_p >= 0.0 && a_.dropout_p < 1.0, "dropout_p must be in [0, 1)");
    require(a_.dropout_p == 0.0 || problem.seed.has_value(), "dropout needs a seed: pass a tensor of one int64");
    arguments_.check_number("seed", problem.seed);
    a_.seed = optional_data<int64_t>(problem.seed);
    check_weighting();
  }

  // Returns `query` if the device's kernels can read it; all other tensors are compared with its device.
  static const Tensor& on_device(const Tensor& query) {
    if (!Device::takes(query)) {
      refuse("query", std::string("a tensor that the ") + Device::kName + " backend can read", query);
    }
    return query;
  }

  // Checks dtypes and shapes of query, key and value and sets the sizes of the problem.
  void check_shapes(const Tensor& key, const Tensor& value) {
    const char *form = packed_ ? "[N, H, D]" : "[B, H, Q, D]", *key_form = packed_ ? "[M, Hkv, D]" : "[B, Hkv, K, D]";
    const size_t dims = packed_ ? 3 : 4, row_axis = packed_ ? 0 : 2, dim_axis = dims - 1;
    const auto sizes = query_.sizes(), key_sizes = key.sizes();
    a_.dtype = kernel_dtype();
    if (sizes.size() != dims) refuse("query", form, query_);
    if (key_sizes.size() != dims) refuse("key", key_form, key);
    a_.head_dim = sizes[dim_axis];
    if (a_.head_dim < 1 || a_.head_dim > kLargestHeadDim) {
      refuse("query", std::string(form) + " with head sizes up to " + std::to_string(kLargestHeadDim), query_);
    }
    a_.num_heads = sizes[1];
    a_.num_key_heads = key_sizes[1];
    rows_ = a_.num_queries = a_.total_queries = sizes[row_axis];
    keys_ = a_.num_keys = a_.total_keys = key_sizes[row_axis];
    outer_ = a_.batch = packed_ ? 1 : sizes[0];
    check_rows("key", key, dtype_, keys_, a_.num_key_heads);
    check_rows("value", value, dtype_, keys_, a_.num_key_heads);
    const double most_rows = static_cast<double>(rows_) + static_cast<double>(keys_) + 1;
    require(static_cast<double>(outer_) * a_.num_heads * most_rows * a_.head_dim < kMostElements,
            "there are too many rows: batch * heads * (queries + keys + 1) * head_dim must be below 2^60");
    if (a_.num_key_heads < 1 || a_.num_heads % a_.num_key_heads != 0) {
      refuse("key", std::string(key_form) + " with Hkv a divisor of " + std::to_string(a_.num_heads), key);
    }
  }

  // Checks a tensor of rows: [B, H, N, D], or packed [N, H, D].
  void check_rows(const char* name, const Tensor& tensor, ScalarType dtype, int64_t rows, int64_t heads) const {
    if (packed_) {
      arguments_.check(name, tensor, dtype, {rows, heads, a_.head_dim});
    } else {
      arguments_.check(name, tensor, dtype, {outer_, heads, rows, a_.head_dim});
    }
  }

  // Checks cause, head_strength and key_mask, and describes the weights of the keys.
  void check_weighting() {
    KeyWeights& w = weights_;
    w.keys = keys_;
    w.strength = static_cast<float>(problem_.strength);
    if (problem_.head_strength.has_value()) {
      arguments_.check_contiguous("head_strength", *problem_.head_strength, ScalarType::Float, {a_.num_heads});
      w.head_strength = data<float>(*problem_.head_strength);
    }
    if (problem_.key_mask.has_value()) {
      if (packed_) {
        arguments_.check_contiguous("key_mask", *problem_.key_mask, ScalarType::Bool, {keys_});
      } else {
        arguments_.check_contiguous("key_mask", *problem_.key_mask, ScalarType::Bool, {outer_, keys_});
      }
      w.key_mask = data<bool>(*problem_.key_mask);
    }
    if (problem_.cause.has_value()) {
      check_cause(*problem_.cause);
      w.cause = data<float>(*problem_.cause);
      w.cause_head = cause_heads_ == 1 ? 0 : keys_;
      w.cause_batch = cause_outer_ == 1 ? 0 : cause_heads_ * keys_;
    }
    w.heads = cause_heads_ > 1 || (w.head_strength != nullptr && w.cause != nullptr) ? a_.num_heads : 1;
    w.batch = cause_outer_ != 1 || w.key_mask != nullptr ? outer_ : 1;
  }

  // Returns whether weights are stored; otherwise all are 1.
  bool has_weights() const {
    return !Device::kOnesAreNull || problem_.cause.has_value() || problem_.key_mask.has_value();
  }

  // Computes the weights of the keys.
  Tensor compute_weights() {
    if (!has_weights()) return empty<1>(query_, {0}, ScalarType::Float);
    const Tensor weights = empty<3>(query_, {weights_.batch, weights_.heads, keys_}, ScalarType::Float);
    set_weights(weights);
    device_.compute_weights(weights_);
    return weights;
  }

  // Checks weights that a forward pass has returned.
  void check_weights(const Tensor& weights) {
    if (has_weights()) {
      arguments_.check_contiguous("weights", weights, ScalarType::Float, {weights_.batch, weights_.heads, keys_});
      set_weights(weights);
    } else {
      arguments_.check("weights", weights, ScalarType::Float, {0});
    }
  }

  void set_weights(const Tensor& weights) {
    weights_.weight = data<float>(weights);
    a_.weight = {weights_.weight, weights_.batch == 1 ? 0 : weights_.heads * keys_, weights_.heads == 1 ? 0 : keys_};
  }

  // Checks a cause: [B or 1, K] or [B or 1, H or 1, K]; packed [M] or [H or 1, M].
  void check_cause(const Tensor& cause) {
    const auto sizes = cause.sizes();
    const size_t dims = sizes.size() + (packed_ ? 1 : 0);
    if (dims != 2 && dims != 3) {
      refuse("cause", packed_ ? "float32 [M] or [H or 1, M]" : "float32 [B or 1, K] or [B or 1, H or 1, K]", cause);
    }
    cause_outer_ = packed_ || sizes[0] == 1 ? 1 : outer_;
    cause_heads_ = dims == 2 || sizes[sizes.size() - 2] == 1 ? 1 : a_.num_heads;
    const auto check = [&](std::initializer_list<int64_t> expected) {
      arguments_.check_contiguous("cause", cause, ScalarType::Float, expected);
    };
    if (packed_) {
      dims == 2 ? check({keys_}) : check({cause_heads_, keys_});
    } else {
      dims == 2 ? check({cause_outer_, keys_}) : check({cause_outer_, cause_heads_, keys_});
    }
  }

  // `for_backward` says that a backward pass follows, which is more exact with the rounding of the output.
  std::tuple<Tensor, Tensor, Tensor, Tensor> forward(bool for_backward) {
    Tensor weights = compute_weights();
    Tensor output = new_matrices(rows_, a_.num_heads, dtype_);
    Tensor rounding = for_backward && stores_rounding() ? new_matrices(rows_, a_.num_heads, ScalarType::Short)
                                                        : empty<1>(query_, {0}, ScalarType::Short);
    Tensor statistics = packed_ ? empty<3>(query_, {a_.num_heads, parts(), rows_}, ScalarType::Float)
                                : empty<4>(query_, {outer_, a_.num_heads, parts(), rows_}, ScalarType::Float);
    set_results(output, rounding, statistics);
    device_.forward(a_, query_);
    return {output, rounding, statistics, weights};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& output,
                                                      const Tensor& rounding, const Tensor& statistics,
                                                      const Tensor& weights, bool cause_grad) {
    check_rows("grad_output", grad_output, dtype_, rows_, a_.num_heads);
    check_rows("output", output, dtype_, rows_, a_.num_heads);
    if (stores_rounding() && rounding.dim() != 1) {
      check_rows("rounding", rounding, ScalarType::Short, rows_, a_.num_heads);
    } else {
      arguments_.check("rounding", rounding, ScalarType::Short, {0});
    }
    if (packed_) {
      arguments_.check_contiguous("statistics", statistics, ScalarType::Float, {a_.num_heads, parts(), rows_});
    } else {
      arguments_.check_contiguous("statistics", statistics, ScalarType::Float, {outer_, a_.num_heads, parts(), rows_});
    }
    require(!cause_grad || problem_.cause.has_value(), "cause_grad without cause: pass the cause of the forward pass");
    check_weights(weights);
    set_results(output, rounding, statistics);
    AttentionBackward g;
    g.forward = a_;
    Tensor grad_query = new_matrices(rows_, a_.num_heads, dtype_);
    Tensor grad_key = new_matrices(keys_, a_.num_key_heads, dtype_);
    Tensor grad_value = new_matrices(keys_, a_.num_key_heads, dtype_);
    g.grad_output = matrices(grad_output);
    g.grad_query = matrices(grad_query);
    g.grad_key = matrices(grad_key);
    g.grad_value = matrices(grad_value);
    std::optional<Tensor> grad_weight;
    if (cause_grad) {
      grad_weight = empty<3>(query_, {outer_, a_.num_heads, keys_}, ScalarType::Float);
      g.grad_weight = {data<float>(*grad_weight), packed_ ? 0 : a_.num_heads * keys_, keys_};
      g.key_mask = problem_.key_mask.has_value() ? data<bool>(*problem_.key_mask) : nullptr;
      g.key_mask_batch = packed_ ? 0 : keys_;
    }
    device_.backward(g, query_);
    Tensor grad_cause = cause_grad ? reduce_grad_cause(*grad_weight) : empty<1>(query_, {0}, ScalarType::Float);
    return {grad_query, grad_key, grad_value, grad_cause};
  }

  // Sets where the forward pass stores its results, which the backward pass reads.
  void set_results(const Tensor& output, const Tensor& rounding, const Tensor& statistics) {
    a_.output = matrices(output);
    if (rounding.dim() != 1) a_.rounding = matrices(rounding);
    float* maximum = data<float>(statistics);
    const int64_t head = parts() * rows_, batch = packed_ ? 0 : a_.num_heads * head;
    a_.maximum = {maximum, batch, head};
    a_.total = {parts() == 2 ? maximum + rows_ : nullptr, batch, head};
  }

  // Returns the gradient of cause from the gradient of the weights, summed over broadcast dimensions.
  Tensor reduce_grad_cause(const Tensor& grad_weight) {
    Tensor grad_cause = torch::stable::new_empty(*problem_.cause, problem_.cause->sizes());
    GradCause g{};
    g.batch = outer_;
    g.heads = a_.num_heads;
    g.keys = keys_;
    g.grad_weight = data<float>(grad_weight);
    g.head_strength = problem_.head_strength.has_value() ? data<float>(*problem_.head_strength) : nullptr;
    g.strength = static_cast<float>(problem_.strength);
    g.cause_batch = cause_outer_;
    g.cause_heads = cause_heads_;
    g.grad_cause = data<float>(grad_cause);
    device_.reduce_grad_cause(g);
    return grad_cause;
  }

  DType kernel_dtype() const {
    switch (dtype_) {
      case ScalarType::Float: return DType::kFloat32;
      case ScalarType::BFloat16: return DType::kBFloat16;
      case ScalarType::Half: return DType::kFloat16;
      default: refuse("query", "float32, bfloat16 or float16", query_);
    }
  }

  bool stores_rounding() const { return Device::kLosslessStatistics && a_.dtype != DType::kFloat32; }
  // Returns in how many parts LSE is stored.
  int64_t parts() const { return Device::kLosslessStatistics || a_.dtype == DType::kFloat32 ? 2 : 1; }

  // Returns pointer and strides of a tensor of rows. The kernels accept any strides but that of the last
  // dimension, which must be 1; a tensor with another one is copied first.
  Matrices matrices(const Tensor& tensor) {
    const bool copied = a_.head_dim != 1 && tensor.stride(packed_ ? 2 : 3) != 1;
    if (copied) copies_.push_back(torch::stable::contiguous(tensor));
    const Tensor& whole = copied ? copies_.back() : tensor;
    if (packed_) return {data<void>(whole), 0, whole.stride(1), whole.stride(0)};
    return {data<void>(whole), whole.stride(0), whole.stride(1), whole.stride(2)};
  }

  template <class T>
  const T* optional_data(const OptionalTensor& tensor) {
    return tensor.has_value() ? data<T>(*tensor) : nullptr;
  }

  template <class T>
  T* data(const Tensor& tensor) {
    device_.borrow(tensor);
    return static_cast<T*>(tensor.data_ptr());
  }

  // Returns an uninitialised tensor of rows. In memory it is [B, N, H, D]; the result is its view [B, H, N, D].
  Tensor new_matrices(int64_t rows, int64_t heads, ScalarType dtype) {
    const int64_t dim = a_.head_dim;
    if (packed_) return empty<3>(query_, {rows, heads, dim}, dtype);
    return empty<4>(query_, {outer_, heads, rows, dim}, {rows * heads * dim, dim, heads * dim, 1}, dtype);
  }

  Arguments arguments_;
  Device device_;
  Problem problem_;
  Attention a_{};
  const Tensor& query_;
  ScalarType dtype_;
  bool packed_;
  int64_t rows_, keys_;  // of the tensors: per batch, or of all packed sequences
  int64_t outer_;        // batch of the tensors: 1 if packed
  int64_t cause_outer_ = 1, cause_heads_ = 1;
  KeyWeights weights_{};
  std::vector<Tensor> copies_;  // memory that pointers in `a_` lead to, besides arguments and results
};

}  // namespace empcause

// The schemas of the two raw operators, which every backend has. A test compares those of
// kernels/operators.py with them.
#define EMPCAUSE_INPUTS "Tensor query, Tensor key, Tensor value, "
#define EMPCAUSE_OPTIONS                                                                   \
  "Tensor? cause, float strength, Tensor? head_strength, Tensor? key_mask, "               \
  "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, " \
  "bool causal, float scale, float dropout_p, Tensor? seed, Tensor? query_offset, "

#define EMPCAUSE_DEFINE_OPERATORS(library)                                                                             \
  library.def("attention(" EMPCAUSE_INPUTS EMPCAUSE_OPTIONS "bool for_backward) -> (Tensor, Tensor, Tensor, Tensor)"); \
  library.def("attention_backward(Tensor grad_output, " EMPCAUSE_INPUTS                                                \
              "Tensor output, Tensor rounding, Tensor statistics, Tensor weights, " EMPCAUSE_OPTIONS                   \
              "bool cause_grad) -> (Tensor, Tensor, Tensor, Tensor)")

#define EMPCAUSE_IMPLEMENT_OPERATORS(library, Device)                            \
  library.impl("attention", TORCH_BOX(&empcause::Operators<Device>::attention)); \
  library.impl("attention_backward", TORCH_BOX(&empcause::Operators<Device>::attention_backward))
