// Decoding: few queries over many keys. The queries of the heads that share keys are the rows of one warp, so that keys
// are read once, and the keys are divided into enough parts to occupy the GPU. The parts' sums are combined in their
// order.
#pragma once

#include "forward.h"

namespace empcause::cuda {

// How to decode; heads = 0 where the general kernel is the better one.
struct Decoding {
  int64_t heads = 0, parts = 1;
};

inline Decoding decoding(const Attention& a) {
  constexpr int64_t kRows = 16, kMostParts = 128, kFewestKeys = 128;  // of a part
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  Decoding d;
  if (a.dropout_p > 0.0 || a.num_queries > kRows || a.num_queries == 0 || a.batch == 0) return d;
  // Heads of one block share their weights, too.
  const int64_t group = a.weight.head == 0 ? a.num_heads / a.num_key_heads : 1;
  for (d.heads = group; group % d.heads != 0 || (d.heads > 1 && d.heads * a.num_queries > kRows);) --d.heads;
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors(), blocks = a.batch * (a.num_heads / d.heads);
  d.parts = clamped((wanted + blocks - 1) / blocks, 1, clamped(a.num_keys / kFewestKeys, 1, kMostParts));
  return d;
}

template <class T>
struct CombineKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kMinBlocks = 1;
  static constexpr uint32_t kSharedBytes = 0;
  using Arguments = ForwardArguments;

  static EMPCAUSE_ANYWHERE int64_t num_rows(const Attention& a) { return a.batch * a.num_heads * a.num_queries; }

  // A warp a row.
  static EMPCAUSE_DEVICE void run(const ForwardArguments& f) {
    const Attention& a = f.a;
    const int64_t index = static_cast<int64_t>(block_index().x) * kWarps + warp_index();
    if (index >= num_rows(a)) return;
    const int query = static_cast<int>(index % a.num_queries);
    const int head = static_cast<int>(index / a.num_queries % a.num_heads);
    const int batch = static_cast<int>(index / a.num_queries / a.num_heads);
    const Sequence s = sequence(a, batch);
    if (query >= s.num_queries) return;

    float maximum = -kInfinity, sum = 0.0f;
    for (int part = 0; part < f.split.parts; ++part) {
      maximum = fmaxf(maximum, load_global(f.split.maximum + f.split.row(a, part, batch, head, query)));
    }
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    const auto factor = [&](int64_t row) { return exp2(load_global(f.split.maximum + row) - shift); };
    for (int part = 0; part < f.split.parts; ++part) {
      const int64_t row = f.split.row(a, part, batch, head, query);
      sum = fused(load_global(f.split.sum + row), factor(row), sum);
    }
    const bool dead = sum == 0.0f;
    const int query_row = static_cast<int>(s.query_begin) + query;
    T* const output = row_of<T>(a.output, batch, head, query_row);
    for (int column = lane(); column < a.head_dim; column += kWarp) {
      float total = 0.0f;
      for (int part = 0; part < f.split.parts; ++part) {
        const int64_t row = f.split.row(a, part, batch, head, query);
        total = fused(load_global(f.split.output + row * a.head_dim + column), factor(row), total);
      }
      store_global(output + column, from_float<T>(dead ? 0.0f : total / sum));
    }
    if (lane() == 0) LogSumExp<T>::of(maximum, sum).store(a, batch, head, query_row);
  }
};

}  // namespace empcause::cuda
