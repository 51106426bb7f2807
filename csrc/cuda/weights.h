// The kernels for the key weights and for grad_cause. Each thread computes one element; sums over
// broadcast dimensions have a fixed order.
#pragma once

#include "../attention.h"
#include "fragment.h"

namespace empcause::cuda {

constexpr int kElementThreads = 256;

inline Index3 element_blocks(int64_t count) {
  return {static_cast<uint32_t>((count + kElementThreads - 1) / kElementThreads), 1, 1};
}

EMPCAUSE_DEVICE int64_t element_index() { return static_cast<int64_t>(block_index().x) * kElementThreads + thread(); }

struct WeightsKernel {
  static constexpr int kThreads = kElementThreads, kMinBlocks = 1;
  using Arguments = KeyWeights;

  static EMPCAUSE_DEVICE void run(const KeyWeights& a) {
    const int64_t index = element_index();
    if (index >= a.batch * a.heads * a.keys) return;
    const int64_t key = index % a.keys, head = index / a.keys % a.heads, batch = index / a.keys / a.heads;
    const bool masked = a.key_mask != nullptr && !load_global(a.key_mask + batch * a.keys + key);
    float weight = masked ? 0.0f : 1.0f;
    if (!masked && a.cause != nullptr) {
      const float strength = a.head_strength == nullptr ? a.strength : load_global(a.head_strength + head);
      const float cause = load_global(a.cause + batch * a.cause_batch + head * a.cause_head + key);
      // Every backend rounds alike, first the product, then the sum, so that cause = -1 / strength gives the
      // same weight everywhere.
      weight = add_rounded(1.0f, multiply_rounded(strength, cause));
      require(weight >= kSmallestWeight && weight < kInfinity,
              "cause must be finite with 1 + strength * cause >= 0 wherever key_mask is True");
      weight = weight > 0.0f ? weight : 0.0f;
    }
    store_global(a.weight + index, weight);
  }
};

struct GradCauseKernel {
  static constexpr int kThreads = kElementThreads, kMinBlocks = 1;
  using Arguments = GradCause;

  static EMPCAUSE_DEVICE void run(const GradCause& a) {
    const int64_t index = element_index();
    if (index >= a.cause_batch * a.cause_heads * a.keys) return;
    const int64_t key = index % a.keys, head = index / a.keys % a.cause_heads, batch = index / a.keys / a.cause_heads;
    const int64_t batches = a.cause_batch == 1 ? a.batch : 1, heads = a.cause_heads == 1 ? a.heads : 1;
    float total = 0.0f;
    for (int64_t b = batch; b < batch + batches; ++b) {
      for (int64_t h = head; h < head + heads; ++h) {
        const float strength = a.head_strength == nullptr ? a.strength : load_global(a.head_strength + h);
        total = fma(strength, load_global(a.grad_weight + (b * a.heads + h) * a.keys + key), total);
      }
    }
    store_global(a.grad_cause + index, total);
  }
};

}  // namespace empcause::cuda
