// The operator on CUDA devices, for callers in C++: raw pointers to memory of the current device, and a stream. Nothing
// here waits for the GPU. Sums are made in a fixed order, so that results repeat bit by bit on one model of GPU.
#pragma once

#include "../attention.h"

namespace empcause::cuda {

using Stream = void*;  // a cudaStream_t

// w_j; an assertion fails on the device where a cause is not finite or makes a weight negative.
void compute_weights(const KeyWeights& arguments, Stream stream);

// Output and log-sum-exp. Few queries are decoded, see decode.h. `scratch` has room for forward_scratch floats.
void forward(const Attention& arguments, float* scratch, Stream stream);
int64_t forward_scratch(const Attention& arguments);

// All gradients, from what forward stored. `scratch` has room for backward_scratch floats.
void backward(const AttentionBackward& arguments, float* scratch, Stream stream);
int64_t backward_scratch(const AttentionBackward& arguments);

// grad_cause from grad_weight.
void reduce_grad_cause(const GradCause& arguments, Stream stream);

// The kernels of one dtype: one unit each, compiled from kernels.cu.
struct Kernels {
  void (*forward)(const Attention&, float* scratch, Stream);
  void (*backward)(const AttentionBackward&, float* scratch, Stream);
};

extern const Kernels kernels_fp32;
extern const Kernels kernels_bf16;
extern const Kernels kernels_fp16;

}  // namespace empcause::cuda
