// The operator on CUDA devices, for callers in C++, who pass raw pointers to memory of the current
// device and a stream. No function waits for the GPU. Sums have a fixed order, so that results are the
// same bits in every run on one model of GPU.
#pragma once

#include "../attention.h"

namespace empcause::cuda {

using Stream = void*;  // a cudaStream_t

// Computes the weights w_j. An assertion fails on the device where a cause is not finite or makes a weight negative.
void compute_weights(const KeyWeights& arguments, Stream stream);

// Computes the output and LSE; decode.h serves few queries. `scratch` has room for forward_scratch floats. Throws
// std::runtime_error where there are 2^30 rows or more, or too many for one launch.
void forward(const Attention& arguments, float* scratch, Stream stream);
int64_t forward_scratch(const Attention& arguments);

// Computes all gradients from what `forward` stored. `scratch` has room for backward_scratch floats.
// Throws like `forward`.
void backward(const AttentionBackward& arguments, float* scratch, Stream stream);
int64_t backward_scratch(const AttentionBackward& arguments);

// Computes grad_cause from grad_weight.
void reduce_grad_cause(const GradCause& arguments, Stream stream);

// The kernels of one dtype. Each is a unit of its own, compiled from kernels.cu.
struct Kernels {
  void (*forward)(const Attention&, float* scratch, Stream);
  void (*backward)(const AttentionBackward&, float* scratch, Stream);
};

extern const Kernels kernels_fp32;
extern const Kernels kernels_bf16;
extern const Kernels kernels_fp16;

}  // namespace empcause::cuda
