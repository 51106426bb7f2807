// The key weights w_j = key_mask_j * (1 + strength * cause_j), checked, and the gradient of `cause` from theirs.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// Computes the weights. Throws std::runtime_error where a cause is not finite or makes a weight negative, and names its
// key, batch and head.
void compute_weights(const KeyWeights& arguments);

// Computes grad_cause, summed over broadcast dimensions in a fixed order.
void reduce_grad_cause(const GradCause& arguments);

}  // namespace empcause::cpu
