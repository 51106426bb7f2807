// The forward pass: online softmax over tiles of keys (FlashAttention). The keys of a row are always
// added up in the same order.
#pragma once

#include "decode.h"

namespace empcause::cpu::EMPCAUSE_ISA {

// Query rows that a task works on together. With a tile of keys they fit the second-level cache.
constexpr int64_t kBand = 192;

// The sums of a row are divided by 2^reference, where the reference is at first the largest logit of
// the first tile in which the row sees a key. It is raised only to a logit that exceeds it by more
// than this, as raising it multiplies all sums of the row by a correction.
constexpr float kSlack = 8.0f;

// A block of query rows, with the results over the tiles of keys so far.
template <class T>
struct RunningBlock {
  T* query;          // [head_dim in operands, rows]
  float* output;     // [head_dim, rows], not yet divided by the total
  float* reference;  // [rows], the base-2 exponent that output and total are relative to
  float* total;      // [rows]
};

// Adds one tile of keys to a block. `value` holds operands of sums over keys. `logits` [kKeyTile, rows]
// is overwritten with weighted, unnormalised probabilities, which are operands of sums over keys too.
template <class T>
inline void attend(const Attention& a, const KeyTile& tile, KeyRows<T> key, KeyRows<T> value, const Dropout& dropout,
                   int64_t query, int64_t position, Block block, const RunningBlock<T>& running, float* logits,
                   float* factor, PrefetchQueue& prefetches) {
  const int64_t rows = block.rows(), dim = a.head_dim;
  const Staircase stairs(tile, a.causal, position, block.vecs);
  if (stairs.count == 0) return;

  const Vec scale = splat(a.scale * kLog2E);
  Vec best[kMostVecs];
  for (int64_t v = 0; v < block.vecs; ++v) best[v] = splat(-kInfinity);
  for (const Step& step : stairs) {
    const int64_t lane = step.first_vec * kWidth;
    const Vec others = best[step.first_vec];
    matmul(step.end - step.begin, block.vecs - step.first_vec, InRuns{{operands<T>(dim)}},
           LogitsAndLargest{scale, tile.power + step.begin, best + step.first_vec}, key.data + step.begin * key.stride,
           key.stride, 1, running.query + lane, rows, logits + step.begin * rows + lane, rows, prefetches);
    if (!step.ragged) continue;
    Vec most = others;  // the largest logit among those that a query sees
    for (int64_t j = step.begin; j < step.end; ++j) {
      float* row = logits + j * rows + lane;
      const Vec x = seen(tile, j, step, position) ? load(row) : splat(-kInfinity);
      store(row, x);
      most = maximum(x, most);
    }
    best[step.first_vec] = most;
  }

  T* probability = reinterpret_cast<T*>(logits);
  if (dropout.active()) dropout_factors(dropout, tile, stairs.step[stairs.count - 1].end, query, rows, factor);
  for (int64_t v = 0; v < block.vecs; ++v) {
    const int64_t lane = v * kWidth;
    const Vec before = load(running.reference + lane);
    const Vec after = best[v] > before + splat(kSlack) ? best[v] : before;
    const Vec shift = after == splat(-kInfinity) ? Vec{} : after;
    Vec total = load(running.total + lane);
    if (!all(after == before)) {
      store(running.reference + lane, after);
      if (!all(before == splat(-kInfinity))) {
        const Vec correction = exp2(before - shift);
        total *= correction;
        for (int64_t d = 0; d < dim; ++d) {
          float* output = running.output + d * rows + lane;
          store(output, load(output) * correction);
        }
      }
    }
    Vec tile_total{};  // summed by itself, which accumulates fewer rounding errors
    const auto weighted = [&](int64_t j) {
      const Vec p = splat(tile.factor[j]) * exp2(load(logits + j * rows + lane) - shift);
      tile_total += p;
      return dropout.active() ? p * load(factor + tile.place[j] * rows + lane) : p;
    };
    store_over_rows(stairs.keys[v], weighted, probability + lane, rows);
    store(running.total + lane, total + tile_total);
  }
  matmul(dim, block.vecs, Rising<T>{stairs.keys}, Add{}, value.data, 1, value.stride, probability, rows, running.output,
         rows, prefetches);
}

// Keys and values of a key head as operands. A tile is copied when the first block of queries needs
// it, unless it is read in place.
template <class T>
struct PackedKeys {
  T *key, *value;     // [tile, kKeyTile rows of operands]
  int64_t readers;    // the number of blocks of queries that read a key, over all heads that share it
  int64_t tiles = 0;  // that were copied so far

  static int64_t size(int64_t keys, int64_t stride) { return 2 * (keys + kKeyTile) * stride; }
};

// Returns the number of keys that the queries before `end` see.
inline int64_t keys_seen(const Attention& a, const Sequence& s, int64_t end) {
  return a.causal ? clamped(end + s.offset, 0, s.num_keys) : s.num_keys;
}

// The forward pass of query rows [begin, end) of one head, at most a band.
template <class T>
inline void forward_band(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end, const Sequence& s,
                         PackedKeys<T>& packed, float* scratch, PrefetchQueue& prefetches) {
  const int64_t dim = a.head_dim, key_head = head / (a.num_heads / a.num_key_heads);
  const int64_t key_stride = KeyTile::row_stride<SumOver::kHeadDim, T>(dim);
  const int64_t value_stride = KeyTile::row_stride<SumOver::kKeys, T>(dim);
  const Blocks blocks(end - begin);
  const int64_t rows = blocks.rows();
  const Dropout dropout(a, batch, head);

  T* query = reinterpret_cast<T*>(scratch);
  float* output = scratch + dim * rows;
  float* reference = output + dim * rows;
  float* total = reference + rows;
  float* logits = total + rows;
  float* factor = logits + kKeyTile * kMostVecs * kWidth;

  const auto running = [&](Block block) {
    return RunningBlock<T>{query + dim * block.first, output + dim * block.first, reference + block.first,
                           total + block.first};
  };
  const int64_t first_query = batch * a.query.batch + head * a.query.head + (s.query_begin + begin) * a.query.row;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    pack_transposed(a.query, a.dtype, first_query + block.first * a.query.row, end - begin - block.first, block.rows(),
                    dim, running(block).query);
  }
  for (int64_t i = 0; i < dim * rows; ++i) output[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    reference[i] = -kInfinity;
    total[i] = 0.0f;
  }

  const int64_t first_key = batch * a.key.batch + key_head * a.key.head + s.key_begin * a.key.row;
  const int64_t first_value = batch * a.value.batch + key_head * a.value.head + s.key_begin * a.value.row;
  const float* weight = a.weight.data + batch * a.weight.batch + head * a.weight.head + s.key_begin;
  const int64_t last = keys_seen(a, s, end);
  for (int64_t first = 0; first < last; first += kKeyTile) {
    const int64_t keys = s.num_keys - first < kKeyTile ? s.num_keys - first : kKeyTile;
    const KeyTile tile(weight, first, keys, [](int64_t, float w) { return w > 0.0f; });
    const bool known = first < packed.tiles * kKeyTile;
    if (!known) ++packed.tiles;
    const KeyRows<T> key = tile.rows<SumOver::kHeadDim>(a.key, a.dtype, first_key, dim, packed.readers,
                                                        packed.key + first * key_stride, known);
    const KeyRows<T> value = tile.rows<SumOver::kKeys>(a.value, a.dtype, first_value, dim, packed.readers,
                                                       packed.value + operands<T>(first) * value_stride, known);
    for (int64_t i = 0; i < blocks.count; ++i) {
      const Block block = blocks[i];
      const int64_t row = begin + block.first;
      attend(a, tile, key, value, dropout, row, row + s.offset, block, running(block), logits, factor, prefetches);
    }
  }

  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    const RunningBlock<T> done = running(block);
    const int64_t row = begin + block.first, block_rows = end - row < block.rows() ? end - row : block.rows();
    const auto normaliser = [&](int64_t r) {
      const Vec divisor = load(done.total + r);
      const Vec inverse = divisor > Vec{} ? splat(1.0f) / divisor : Vec{};  // a row without a key has output 0
      return divisor == divisor ? inverse : divisor;
    };
    const int64_t at = s.query_begin + row;
    unpack_transposed(done.output, block.rows(), block_rows, dim, normaliser, a.output, a.dtype,
                      a.output.offset(batch, head, at), a.rounding, a.rounding.offset(batch, head, at));
    for (int64_t r = 0; r < block_rows; r += kWidth) {
      store_values<DType::kFloat32>(a.maximum.of(batch, head), at + r, block_rows - r, load(done.reference + r));
      store_values<DType::kFloat32>(a.total.of(batch, head), at + r, block_rows - r, load(done.total + r));
    }
  }
}

// Query rows [begin, end) of all heads that share a key head.
struct ForwardTask {
  int64_t batch, key_head, begin, end;
};

// Returns the rows to prefetch for the band that begins at query row `begin`, without the first
// `known` keys and values.
inline PrefetchQueue prefetches_of_band(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end,
                                        int64_t known) {
  const Sequence s = sequence(a, batch);
  const int64_t last = clamped(begin + kBand, 0, end < s.num_queries ? end : s.num_queries);
  const int64_t key_head = head / (a.num_heads / a.num_key_heads), keys = keys_seen(a, s, last);
  PrefetchQueue prefetches(a);
  const Matrices* const of_queries[] = {&a.query, &a.output};
  const Matrices* const of_keys[] = {&a.key, &a.value};
  for (const Matrices* m : of_queries) prefetches.add(*m, batch, head, s.query_begin + begin, last - begin);
  for (const Matrices* m : of_keys) prefetches.add(*m, batch, key_head, s.key_begin + known, keys - known);
  return prefetches;
}

// Runs a task, band after band of every head. `next` is the task that the thread is likely to run
// afterwards, or null; the last band prefetches its rows.
template <class T>
inline void forward_task(const Attention& a, const ForwardTask& task, const ForwardTask* next) {
  const Sequence s = sequence(a, task.batch);
  const int64_t begin = task.begin, end = task.end < s.num_queries ? task.end : s.num_queries;
  if (begin >= end) return;
  const int64_t dim = a.head_dim, stride = round_up(dim), group = a.num_heads / a.num_key_heads;
  const int64_t rows = round_up(end - begin < kBand ? end - begin : kBand);
  const int64_t keys_size = PackedKeys<T>::size(keys_seen(a, s, end), stride);
  float* scratch = thread_scratch(keys_size + 2 * dim * rows + 2 * rows + 2 * kKeyTile * kMostVecs * kWidth);
  T* operands_of_keys = reinterpret_cast<T*>(scratch);
  PackedKeys<T> packed{operands_of_keys, operands_of_keys + keys_size / 2, group * Blocks(end - begin).count};
  const int64_t first_head = task.key_head * group, last_head = first_head + group - 1;
  for (int64_t head = first_head; head <= last_head; ++head) {
    if (a.weight.head != 0) packed.tiles = 0;  // with other weights, a head may leave out other keys
    for (int64_t row = begin; row < end; row += kBand) {
      const int64_t after = row + kBand < end ? row + kBand : end;
      PrefetchQueue prefetches =
          after < end        ? prefetches_of_band(a, task.batch, head, after, end, keys_seen(a, s, after))
          : head < last_head ? prefetches_of_band(a, task.batch, head + 1, begin, end, keys_seen(a, s, end))
          : next != nullptr  ? prefetches_of_band(a, next->batch, next->key_head * group, next->begin, next->end, 0)
                             : PrefetchQueue(a);
      forward_band(a, task.batch, head, row, after, s, packed, scratch + keys_size, prefetches);
    }
  }
}

template <class T>
inline void forward_as(const Attention& a, ParallelFor parallel_for) {
  // The query rows of few key heads are divided among several tasks. Their number depends on the problem
  // alone, so that results do not depend on the number of threads.
  constexpr int64_t kTasks = 16;
  const int64_t heads = a.batch * a.num_key_heads;
  const int64_t bands = (a.num_queries + kBand - 1) / kBand;
  const int64_t wanted = clamped((kTasks + heads - 1) / heads, 1, bands);
  struct Context {
    const Attention& a;
    int64_t rows, pieces;

    ForwardTask operator[](int64_t index) const {
      const int64_t batch_key_head = index / pieces, begin = index % pieces * rows;
      return {batch_key_head / a.num_key_heads, batch_key_head % a.num_key_heads, begin, begin + rows};
    }
  } context{a, (bands + wanted - 1) / wanted * kBand, 0};
  context.pieces = (a.num_queries + context.rows - 1) / context.rows;
  const Task task = [](void* pointer, int64_t index, int64_t next) {
    const Context& tasks = *static_cast<const Context*>(pointer);
    const ForwardTask next_task = tasks[next < 0 ? index : next];
    forward_task<T>(tasks.a, tasks[index], next < 0 ? nullptr : &next_task);
  };
  parallel_for(heads * context.pieces, task, &context);
}

inline void forward(const Attention& a, ParallelFor parallel_for) {
  if (a.batch * a.num_key_heads == 0 || a.num_queries == 0) return;
  if (decodes(a)) return decode(a, parallel_for);
  with_operands(a.dtype, [&]<class T>() { forward_as<T>(a, parallel_for); });
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
