// Parallel work on the CPU, in torch's thread pool, so that torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

#include "cpu/attention.h"

namespace empcause {

// A thread takes the next task when it has done one: tasks differ in length, and so do processors that others use too.
inline void parallel_for(int64_t count, cpu::Task task, void* context) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) task(context, i, i + 1);
  });
}

}  // namespace empcause
