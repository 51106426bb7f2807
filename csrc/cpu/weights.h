// Key weights w_j = key_mask_j * (1 + strength * cause_j), and the checks of their values.
#pragma once

#include "attention.h"

namespace empcause::cpu {

struct WeightArguments {
  int64_t batch, heads, keys;   // of the result: [batch, heads, keys]
  const float* cause;           // null: all weights are 0 or 1
  int64_t cause_batch, cause_head;  // strides; keys are contiguous
  const float* head_strength;   // [heads], or null: `strength` for all
  float strength;
  const bool* key_mask;         // [batch, keys], or null: all keys
};

// Fills `weight`, contiguous [batch, heads, keys].
// Throws std::runtime_error naming the place of a cause that is not finite or makes a weight negative.
void compute_weights(const WeightArguments& arguments, float* weight);

}  // namespace empcause::cpu
