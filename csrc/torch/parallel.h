// Parallel work on the CPU, in torch's thread pool, so that torch.set_num_threads holds.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "../cpu/kernels.h"

namespace empcause {

// Each thread has a range of neighbouring tasks, and when these are done it helps the others with theirs: tasks differ in
// length, and so do processors that others use too.
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
