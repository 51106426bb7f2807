// The statistics that the forward pass stores for a row: LSE in base 2. It is infinite for a dead row,
// which sees no key, so that its probabilities are 0 in the backward pass.
#pragma once

#include "tile.h"

namespace empcause::cuda {

// For bf16 and fp16, LSE is one number: the digits that it lacks are far below those that the rows themselves lack.
template <class T>
struct LogSumExp {
  float value;

  static EMPCAUSE_DEVICE LogSumExp none() { return {kInfinity}; }
  static EMPCAUSE_DEVICE LogSumExp of(float maximum, float sum) {
    return sum == 0.0f ? none() : LogSumExp{maximum + log2(sum)};
  }
  static EMPCAUSE_DEVICE LogSumExp load(const Attention& a, int batch, int head, int row) {
    return {load_global(row_of(a.maximum, batch, head, row))};
  }
  EMPCAUSE_DEVICE void store(const Attention& a, int batch, int head, int row) const {
    store_global(row_of(a.maximum, batch, head, row), value);
  }

  EMPCAUSE_DEVICE bool sees_a_key() const { return value != kInfinity; }
  EMPCAUSE_DEVICE float taken_from(float logit) const { return logit - value; }
};

// In fp32, LSE has two parts, so that the terms of the backward pass are those of the forward pass, bit for bit.
template <>
struct LogSumExp<float> {
  float maximum, log_total;

  static EMPCAUSE_DEVICE LogSumExp none() { return {kInfinity, 0.0f}; }
  static EMPCAUSE_DEVICE LogSumExp of(float maximum, float sum) {
    return sum == 0.0f ? none() : LogSumExp{maximum, log2(sum)};
  }
  static EMPCAUSE_DEVICE LogSumExp load(const Attention& a, int batch, int head, int row) {
    return {load_global(row_of(a.maximum, batch, head, row)), load_global(row_of(a.total, batch, head, row))};
  }
  EMPCAUSE_DEVICE void store(const Attention& a, int batch, int head, int row) const {
    store_global(row_of(a.maximum, batch, head, row), maximum);
    store_global(row_of(a.total, batch, head, row), log_total);
  }

  EMPCAUSE_DEVICE bool sees_a_key() const { return maximum != kInfinity; }
  EMPCAUSE_DEVICE float taken_from(float logit) const { return logit - maximum - log_total; }
};

}  // namespace empcause::cuda
