// Decoding: attention of few queries over many keys. The queries of the heads that share keys are the
// rows of one warp, so that keys are read once, and the keys are divided into enough parts to occupy
// the GPU. The results of the parts are merged in their order.
#pragma once

#include "forward.h"

namespace empcause::cuda {

// How to decode: the heads of one thread block and the number of parts. `heads` is 0 where the general
// kernel runs instead.
struct DecodePlan {
  int64_t heads = 0, parts = 1;
};

inline DecodePlan decode_plan(const Attention& a) {
  constexpr int64_t kRows = 16;  // of one warp
  constexpr int64_t kMostParts = 128;
  constexpr int64_t kFewestKeys = 128;  // of a part
  constexpr int64_t kBlocksPerMultiprocessor = 4;
  DecodePlan d;
  if (a.dropout_p > 0.0 || a.num_queries > kRows || a.num_queries == 0 || a.batch == 0) return d;
  // The heads of one block must share their weights, too.
  const int64_t group = a.weight.head == 0 ? a.num_heads / a.num_key_heads : 1;
  for (d.heads = group; group % d.heads != 0 || (d.heads > 1 && d.heads * a.num_queries > kRows);) --d.heads;
  const int64_t wanted = kBlocksPerMultiprocessor * multiprocessors(), blocks = a.batch * (a.num_heads / d.heads);
  d.parts = clamped((wanted + blocks - 1) / blocks, 1, clamped(a.num_keys / kFewestKeys, 1, kMostParts));
  return d;
}

template <class T, int kHeadDim>
struct DecodeKernel {
  using Block = ForwardBlock<T, kHeadDim, false, true>;
  using Arguments = ForwardArguments;
  static constexpr int kThreads = Block::Shape::kThreads, kMinBlocks = Block::Shape::kMinBlocks;
  static constexpr uint32_t kSharedBytes = Block::kSharedBytes;

  static int64_t num_blocks(const ForwardArguments& f) {
    return f.a.batch * (f.a.num_heads / f.parts.heads) * Block::row_blocks(f);
  }

  static EMPCAUSE_DEVICE void run(const ForwardArguments& f) {
    const int parts = Block::row_blocks(f), block = static_cast<int>(block_index().x);
    Block(f, block % parts, block / parts).run();
  }
};

// Merges the results of the parts; each warp merges one row.
template <class T>
struct MergeKernel {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp, kMinBlocks = 1;
  static constexpr uint32_t kSharedBytes = 0;
  using Arguments = ForwardArguments;

  static EMPCAUSE_ANYWHERE int64_t num_rows(const Attention& a) { return a.batch * a.num_heads * a.num_queries; }

  static EMPCAUSE_DEVICE void run(const ForwardArguments& f) {
    const Attention& a = f.a;
    const int64_t index = static_cast<int64_t>(block_index().x) * kWarps + warp_index();
    if (index >= num_rows(a)) return;
    const int query = static_cast<int>(index % a.num_queries);
    const int head = static_cast<int>(index / a.num_queries % a.num_heads);
    const int batch = static_cast<int>(index / a.num_queries / a.num_heads);
    const Sequence s = sequence(a, batch);
    if (query >= s.num_queries) return;

    float maximum = -kInfinity, total = 0.0f;
    for (int part = 0; part < f.parts.count; ++part) {
      maximum = fmaxf(maximum, load_global(f.parts.maximum + f.parts.row(a, part, batch, head, query)));
    }
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    const auto factor = [&](int64_t row) { return exp2(load_global(f.parts.maximum + row) - shift); };
    for (int part = 0; part < f.parts.count; ++part) {
      const int64_t row = f.parts.row(a, part, batch, head, query);
      total = fma(load_global(f.parts.total + row), factor(row), total);
    }
    const bool dead = total == 0.0f;
    const int query_row = static_cast<int>(s.query_begin) + query;
    T* const output = row_of<T>(a.output, batch, head, query_row);
    for (int column = lane(); column < a.head_dim; column += kWarp) {
      float sum = 0.0f;
      for (int part = 0; part < f.parts.count; ++part) {
        const int64_t row = f.parts.row(a, part, batch, head, query);
        sum = fma(load_global(f.parts.output + row * a.head_dim + column), factor(row), sum);
      }
      store_global(output + column, from_float<T>(dead ? 0.0f : sum / total));
    }
    if (lane() == 0) LogSumExp<T>::of(maximum, total).store(a, batch, head, query_row);
  }
};

}  // namespace empcause::cuda
