// The parallel for loop of the CPU's kernels. It runs in torch's thread pool, so that torch.set_num_threads applies.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace empcause {

// Gives each thread a range of neighbouring tasks; a thread that is done with its range takes tasks from the
// ranges of others, as tasks differ in length, and processors that run other programs too differ in speed.
inline void parallel_for(int64_t count, cpu::Task task, void* context) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::vector<Range> ranges(threads);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = count * t / threads;
    ranges[t].end = count * (t + 1) / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t t = 0; t < threads; ++t) {
      Range& range = ranges[(first + t) % threads];
      for (int64_t i = range.next++; i < range.end; i = range.next++) task(context, i, i + 1 < range.end ? i + 1 : -1);
    }
  });
}

}  // namespace empcause
