// Key weights w_j = key_mask_j * (1 + strength * cause_j) with the checks of their values, and the way back to grad_cause.
#pragma once

#include "../attention.h"

namespace empcause::cpu {

// Throws std::runtime_error naming the place of a cause that is not finite or makes a weight negative.
void compute_weights(const KeyWeights& arguments);

// Sums over what was broadcast, in a fixed order.
void reduce_grad_cause(const GradCause& arguments);

}  // namespace empcause::cpu
