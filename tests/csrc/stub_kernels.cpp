// In place of the CUDA kernels: each writes the number of its stream into the first place of its result.
#include <cstdint>

#include "cuda/kernels.h"

namespace empcause::cuda {

namespace {

float number(Stream stream) { return static_cast<float>(reinterpret_cast<intptr_t>(stream)); }

}  // namespace

void compute_weights(const KeyWeights& w, Stream stream) { w.weight[0] = number(stream); }
void forward(const Attention& a, float*, Stream stream) { *static_cast<float*>(a.output.data) = number(stream); }
int64_t forward_scratch(const Attention&) { return 0; }
void backward(const AttentionBackward&, float*, Stream) {}
int64_t backward_scratch(const AttentionBackward&) { return 0; }
void reduce_grad_cause(const GradCause&, Stream) {}

}  // namespace empcause::cuda
