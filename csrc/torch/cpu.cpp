// torch.ops.empcause_cpu: the raw operators on the CPU.
#include <algorithm>

#include "../cpu/kernels.h"
#include "../cpu/weights.h"
#include "operators.h"
#include "parallel.h"

namespace empcause {
namespace {

void check_prefix_sums(const int32_t* sums, int64_t count, int64_t rows, const char* what) {
  bool fine = sums[0] == 0 && sums[count - 1] == rows;
  for (int64_t i = 1; i < count; ++i) fine = fine && sums[i] >= sums[i - 1];
  require(fine, what);
}

struct Cpu {
  static constexpr const char* kName = "cpu";
  static constexpr bool kLosslessStatistics = true;
  static constexpr bool kOnesAreNull = false;

  static bool takes(const Tensor& tensor) { return tensor.is_cpu(); }

  explicit Cpu(const Tensor&) {}

  void borrow(const Tensor&) {}

  void check_packing(Attention& a, int64_t longest_query, int64_t longest_key) {
    check_prefix_sums(a.cu_queries, a.batch + 1, a.total_queries,
                      "cu_seqlens_q must rise from 0 to the number of query rows");
    check_prefix_sums(a.cu_keys, a.batch + 1, a.total_keys, "cu_seqlens_k must rise from 0 to the number of key rows");
    a.num_queries = a.num_keys = 0;
    for (int64_t b = 0; b < a.batch; ++b) {
      a.num_queries = std::max<int64_t>(a.num_queries, a.cu_queries[b + 1] - a.cu_queries[b]);
      a.num_keys = std::max<int64_t>(a.num_keys, a.cu_keys[b + 1] - a.cu_keys[b]);
    }
    require(a.num_queries <= longest_query && a.num_keys <= longest_key,
            "a sequence is longer than max_seqlen_q or max_seqlen_k, which must be at least the longest length");
  }

  void compute_weights(const KeyWeights& w) { cpu::compute_weights(w); }
  void reduce_grad_cause(const GradCause& g) { cpu::reduce_grad_cause(g); }
  void forward(const Attention& a, const Tensor&) { cpu::select_kernels().forward(a, parallel_for); }
  void backward(const AttentionBackward& g, const Tensor&) { cpu::select_kernels().backward(g, parallel_for); }
};

}  // namespace
}  // namespace empcause

STABLE_TORCH_LIBRARY(empcause_cpu, library) { EMPCAUSE_DEFINE_OPERATORS(library); }

STABLE_TORCH_LIBRARY_IMPL(empcause_cpu, CPU, library) { EMPCAUSE_IMPLEMENT_OPERATORS(library, empcause::Cpu); }
