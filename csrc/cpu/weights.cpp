// Every backend rounds a weight alike: first the product, then the sum. This file is compiled without
// contraction to fused multiply-adds (CMakeLists.txt), so that cause = -1 / strength gives the same
// weight, bit for bit, on every backend.
#include "weights.h"

#include <cmath>
#include <sstream>
#include <stdexcept>

namespace empcause::cpu {

namespace {

[[noreturn]] void refuse(const KeyWeights& a, int64_t b, int64_t h, int64_t j, float cause, float strength) {
  std::ostringstream message;
  message << "cause";
  if (std::isfinite(cause)) {
    message << " gives key " << j << " the negative weight 1 + " << strength << " * " << cause;
  } else {
    message << " is " << cause << " at key " << j;
  }
  message << " (batch " << b << (a.heads > 1 ? ", head " + std::to_string(h) : "")
          << "); expected finite values with 1 + strength * cause >= 0 wherever key_mask is True";
  throw std::runtime_error(message.str());
}

}  // namespace

void compute_weights(const KeyWeights& a) {
  float* weight = a.weight;
  for (int64_t b = 0; b < a.batch; ++b) {
    const bool* mask = a.key_mask == nullptr ? nullptr : a.key_mask + b * a.keys;
    for (int64_t h = 0; h < a.heads; ++h, weight += a.keys) {
      if (a.cause == nullptr) {
        for (int64_t j = 0; j < a.keys; ++j) weight[j] = mask == nullptr || mask[j] ? 1.0f : 0.0f;
        continue;
      }
      const float* cause = a.cause + b * a.cause_batch + h * a.cause_head;
      const float strength = a.head_strength == nullptr ? a.strength : a.head_strength[h];
      for (int64_t j = 0; j < a.keys; ++j) {
        if (mask != nullptr && !mask[j]) {
          weight[j] = 0.0f;
          continue;
        }
        const float product = strength * cause[j];
        const float w = 1.0f + product;
        if (!(w >= kSmallestWeight) || !std::isfinite(w)) refuse(a, b, h, j, cause[j], strength);
        weight[j] = w > 0.0f ? w : 0.0f;
      }
    }
  }
}

void reduce_grad_cause(const GradCause& a) {
  for (int64_t i = 0; i < a.cause_batch * a.cause_heads * a.keys; ++i) a.grad_cause[i] = 0.0f;
  for (int64_t b = 0; b < a.batch; ++b) {
    for (int64_t h = 0; h < a.heads; ++h) {
      const float strength = a.head_strength == nullptr ? a.strength : a.head_strength[h];
      const float* grad_weight = a.grad_weight + (b * a.heads + h) * a.keys;
      const int64_t row = (a.cause_batch == 1 ? 0 : b) * a.cause_heads + (a.cause_heads == 1 ? 0 : h);
      for (int64_t j = 0; j < a.keys; ++j) a.grad_cause[row * a.keys + j] += strength * grad_weight[j];
    }
  }
}

}  // namespace empcause::cpu
