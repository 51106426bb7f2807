// The functions of kernels.h: they select the kernels for a problem's dtype, size scratch memory, and
// launch the kernels for the weights, which are the same for all dtypes.
#include <algorithm>
#include <stdexcept>

#include "decode.h"
#include "kernels.h"
#include "weights.h"

namespace empcause::cuda {

namespace {

const Kernels& kernels_of(const Attention& a) {
  if (std::max({a.num_queries, a.num_keys, a.total_queries, a.total_keys}) >= kMostRows) {
    throw std::runtime_error("empcause: the CUDA kernels take fewer than 2^30 queries and keys");
  }
  switch (a.dtype) {
    case DType::kFloat32: return kernels_fp32;
    case DType::kBFloat16: return kernels_bf16;
    case DType::kFloat16: return kernels_fp16;
  }
  throw std::runtime_error("empcause: unknown dtype");
}

}  // namespace

void compute_weights(const KeyWeights& arguments, Stream stream) {
  launch<WeightsKernel>(element_blocks(arguments.batch * arguments.heads * arguments.keys), 0, stream, arguments);
}

void reduce_grad_cause(const GradCause& arguments, Stream stream) {
  launch<GradCauseKernel>(element_blocks(arguments.cause_batch * arguments.cause_heads * arguments.keys), 0, stream,
                          arguments);
}

int64_t forward_scratch(const Attention& a) {
  const DecodePlan d = decode_plan(a);
  return d.parts == 1 ? 0 : d.parts * a.batch * a.num_heads * a.num_queries * (a.head_dim + 2);
}

void forward(const Attention& a, float* scratch, Stream stream) { kernels_of(a).forward(a, scratch, stream); }

int64_t backward_scratch(const AttentionBackward& g) {
  const Attention& a = g.forward;
  return (a.cu_queries == nullptr ? a.batch : 1) * a.num_heads * a.total_queries;
}

void backward(const AttentionBackward& g, float* scratch, Stream stream) {
  kernels_of(g.forward).backward(g, scratch, stream);
}

}  // namespace empcause::cuda
