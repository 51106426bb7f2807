// The kernels of one dtype. CMakeLists.txt compiles this file once per dtype, with -DEMPCAUSE_DTYPE=fp32, bf16 or fp16.
#include <type_traits>

#include "backward.h"
#include "decode.h"
#include "kernels.h"

#if !defined(EMPCAUSE_DTYPE)
#define EMPCAUSE_DTYPE fp32
#endif
#define EMPCAUSE_JOIN_EXPANDED(a, b) a##b
#define EMPCAUSE_JOIN(a, b) EMPCAUSE_JOIN_EXPANDED(a, b)

namespace empcause::cuda {

namespace {

using fp32 [[maybe_unused]] = float;
using bf16 [[maybe_unused]] = BFloat16;
using fp16 [[maybe_unused]] = Float16;
using T = EMPCAUSE_DTYPE;

// Returns whether all rows begin at multiples of 16 bytes and consist of whole chunks of 16 bytes.
bool has_whole_chunks(const Attention& a, const Matrices& m) {
  const auto fits = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(T)) % kChunkBytes == 0; };
  return reinterpret_cast<uintptr_t>(m.data) % kChunkBytes == 0 && fits(a.head_dim) && fits(m.batch) && fits(m.head) &&
         fits(m.row);
}

template <class Kernel>
void launch_blocks(int64_t blocks, const typename Kernel::Arguments& arguments, Stream stream) {
  if (blocks > INT32_MAX) {
    throw std::runtime_error(
        "empcause: too many rows for one launch of a CUDA kernel (2^31 - 1 blocks): split the batch");
  }
  launch<Kernel>({static_cast<uint32_t>(blocks), 1, 1}, Kernel::kSharedBytes, stream, arguments);
}

// Calls call(std::integral_constant) with the smallest head size that kernels exist for and that is not below head_dim.
template <class Call>
void with_head_dim(int64_t head_dim, Call call) {
  if (head_dim <= 32) return call(std::integral_constant<int, 32>{});
  if (head_dim <= 64) return call(std::integral_constant<int, 64>{});
  if (head_dim <= 96) return call(std::integral_constant<int, 96>{});
  if (head_dim <= 128) return call(std::integral_constant<int, 128>{});
  if (head_dim <= 256) return call(std::integral_constant<int, 256>{});
  throw std::runtime_error("empcause: the CUDA kernels take head sizes up to 256");
}

template <class Kernel>
void launch_forward(const ForwardArguments& f, Stream stream) {
  launch_blocks<Kernel>(Kernel::num_blocks(f), f, stream);
}

void forward_rows(const Attention& a, float* scratch, Stream stream) {
  ForwardArguments f{a, DropoutRate(a.dropout_p), false, {}};
  f.whole_chunks = has_whole_chunks(a, a.query) && has_whole_chunks(a, a.key) && has_whole_chunks(a, a.value) &&
                   has_whole_chunks(a, a.output);
  const DecodePlan d = decode_plan(a);
  with_head_dim(a.head_dim, [&](auto head_dim) {
    constexpr int kHeadDim = decltype(head_dim)::value;
    if (d.heads == 0) {
      if (f.dropout.threshold == 0) {
        launch_forward<ForwardKernel<T, kHeadDim, false>>(f, stream);
      } else {
        launch_forward<ForwardKernel<T, kHeadDim, true>>(f, stream);
      }
      return;
    }
    const int64_t partial_rows = d.parts * MergeKernel<T>::num_rows(a);
    f.parts = {static_cast<int>(d.parts), static_cast<int>(d.heads), scratch, scratch + partial_rows * a.head_dim,
               scratch + partial_rows * (a.head_dim + 1)};
    launch_forward<DecodeKernel<T, kHeadDim>>(f, stream);
    if (d.parts > 1) {
      constexpr int kWarps = MergeKernel<T>::kWarps;
      launch_blocks<MergeKernel<T>>((MergeKernel<T>::num_rows(a) + kWarps - 1) / kWarps, f, stream);
    }
  });
}

template <int kHeadDim, bool kDropout>
void launch_backward(const BackwardArguments& f, Stream stream) {
  using Queries = BackwardQueriesKernel<T, kHeadDim, kDropout>;
  using Keys = BackwardKeysKernel<T, kHeadDim, kDropout>;
  launch_blocks<Queries>(Queries::num_blocks(f.g.forward), f, stream);
  launch_blocks<Keys>(Keys::num_blocks(f.g.forward), f, stream);
}

void backward_rows(const AttentionBackward& g, float* scratch, Stream stream) {
  const Attention& a = g.forward;
  const int64_t batch = a.cu_queries == nullptr ? a.num_heads * a.total_queries : 0;
  BackwardArguments f{g, DropoutRate(a.dropout_p), true, {scratch, batch, a.total_queries}};
  for (const Matrices* m :
       {&a.query, &a.key, &a.value, &a.output, &g.grad_output, &g.grad_query, &g.grad_key, &g.grad_value}) {
    f.whole_chunks = f.whole_chunks && has_whole_chunks(a, *m);
  }
  with_head_dim(a.head_dim, [&](auto head_dim) {
    if (f.dropout.threshold == 0) {
      launch_backward<decltype(head_dim)::value, false>(f, stream);
    } else {
      launch_backward<decltype(head_dim)::value, true>(f, stream);
    }
  });
}

}  // namespace

const Kernels EMPCAUSE_JOIN(kernels_, EMPCAUSE_DTYPE) = {forward_rows, backward_rows};

}  // namespace empcause::cuda
