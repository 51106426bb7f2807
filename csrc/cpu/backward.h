// The backward pass. It recomputes probabilities from the statistics that the forward pass stored for
// each row. A task owns some tiles of keys of a key head, for all query heads that share it, so every sum
// has a fixed order and threads share nothing. A task sums grad_query over its tiles in memory of its
// own; if the tiles of a key head are divided among several tasks, the sums of these are added in order.
#pragma once

#include "forward.h"

namespace empcause::cpu::EMPCAUSE_ISA {

inline Vec capped(Vec exponent) { return exponent > splat(kLargestExponent) ? splat(kLargestExponent) : exponent; }

// The query rows of one head with their gradients, packed as operands both of sums over rows and of
// sums over head_dim. Rows beyond the last one and dead rows, which see no key, are zero.
template <class T>
struct QueryRows {
  T *query, *grad_output;                        // [rows, stride], operands of sums over rows
  T *query_transposed, *grad_output_transposed;  // per block [head_dim, block rows], operands of sums over head_dim
  float *maximum, *inverse, *delta;              // [rows]; inverse is 1 / total; infinity, 0 and 0 for a dead row
  float* grad_query;                             // per block [head_dim, block rows]

  static int64_t size(int64_t rows, int64_t dim) {
    return 2 * operands<T>(rows) * round_up(dim) + 2 * rows * operands<T>(dim) + rows * (dim + 3);
  }

  QueryRows(float* memory, int64_t rows, int64_t dim)
      : query(reinterpret_cast<T*>(memory)),
        grad_output(query + operands<T>(rows) * round_up(dim)),
        query_transposed(grad_output + operands<T>(rows) * round_up(dim)),
        grad_output_transposed(query_transposed + rows * operands<T>(dim)),
        maximum(reinterpret_cast<float*>(grad_output_transposed + rows * operands<T>(dim))),
        inverse(maximum + rows),
        delta(inverse + rows),
        grad_query(delta + rows) {}
};

// Packs the query rows of one head, computes their deltas and clears grad_query. `scratch` has room
// for [2, block rows, stride].
template <class T>
inline void pack_queries(const AttentionBackward& g, const Sequence& s, int64_t batch, int64_t head,
                         const Blocks& blocks, const QueryRows<T>& packed, float* scratch) {
  const Attention& a = g.forward;
  const int64_t dim = a.head_dim, stride = round_up(dim), row_stride = round_up(operands<T>(dim)), rows = blocks.rows();
  const auto offset = [&](const Matrices& m) { return batch * m.batch + head * m.head + s.query_begin * m.row; };
  const int64_t query = offset(a.query), output = offset(a.output), grad_output = offset(g.grad_output);
  const int64_t rounding = a.rounding.offset(batch, head, s.query_begin);
  const float *maximum = a.maximum.of(batch, head) + s.query_begin, *total = a.total.of(batch, head) + s.query_begin;
  for (int64_t i = 0; i < rows; ++i) {
    const bool alive = i < s.num_queries && total[i] != 0.0f;
    packed.maximum[i] = alive ? maximum[i] : kInfinity;
    packed.inverse[i] = alive ? 1.0f / total[i] : 0.0f;
  }
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    // In fp32 a row is an operand of sums over rows too. Operands of two values are built below from rows
    // in scratch memory.
    T* query_rows = kValues<T> == 1 ? packed.query + block.first * stride : reinterpret_cast<T*>(scratch);
    T* grad_output_rows =
        kValues<T> == 1 ? packed.grad_output + block.first * stride : query_rows + block.rows() * row_stride;
    // Packs kWidth rows and computes their deltas. A delta is summed in the order of the products
    // grad_output . value, so that both are rounded alike where one key has all the weight.
    const auto pack = [&]<DType kType>(int64_t first) {
      for (int r = 0; r < kWidth; ++r) {
        const int64_t next = block.first + first + r + kAhead;
        prefetch_row(a.query, kType, query + next * a.query.row, dim);
        prefetch_row(a.output, kType, output + next * a.output.row, dim);
        prefetch_row(g.grad_output, kType, grad_output + next * g.grad_output.row, dim);
      }
      const int64_t run = InRuns::run(operands<T>(dim)) * kValues<T>;
      int64_t run_end = run;
      Vec delta{}, runs{};
      for (int64_t d = 0; d < stride; d += kWidth) {
        Vec columns[kWidth], output_columns[kWidth];
        for (int r = 0; r < kWidth; ++r) {
          const int64_t row = block.first + first + r;
          const bool alive = packed.inverse[row] != 0.0f;
          const auto values = [&](const Matrices& m, int64_t begin) {
            return alive ? load_values<kType>(m.data, begin + row * m.row + d, dim - d) : Vec{};
          };
          columns[r] = values(g.grad_output, grad_output);
          store_along_row(query_rows + (first + r) * row_stride, d, values(a.query, query));
          store_along_row(grad_output_rows + (first + r) * row_stride, d, columns[r]);
          output_columns[r] = values(a.output, output);
          if (!alive) continue;
          output_columns[r] =
              unrounded<kType>(output_columns[r], a.rounding.data, rounding + row * a.rounding.row + d, dim - d);
        }
        transpose(columns);
        transpose(output_columns);
        for (int c = 0; c < kWidth; ++c) {
          if (d + c == run_end) {
            run_end += run;
            runs += delta;
            delta = Vec{};
          }
          delta = multiply_add(output_columns[c], columns[c], delta);
        }
      }
      store(packed.delta + block.first + first, runs + delta);
    };
    with_dtype<T>(a.dtype, [&]<DType kType>() {
      for (int64_t row = 0; row < block.rows(); row += kWidth) pack.template operator()<kType>(row);
    });
    const int64_t row_operands = operands<T>(dim), place = block.first * row_operands;
    transpose_rows(query_rows, block.rows(), row_operands, packed.query_transposed + place);
    transpose_rows(grad_output_rows, block.rows(), row_operands, packed.grad_output_transposed + place);
    for (int64_t d = 0; kValues<T> == 2 && d < stride; d += kWidth) {
      const auto over_rows = [&](const T* in, T* out) {
        const auto values = [&](int64_t r) { return load_values<DType::kBFloat16>(in + r * row_stride, d); };
        store_over_rows(block.rows(), values, out + operands<T>(block.first) * stride + d, stride);
      };
      over_rows(query_rows, packed.query);
      over_rows(grad_output_rows, packed.grad_output);
    }
  }
  for (int64_t i = 0; i < rows * dim; ++i) packed.grad_query[i] = 0.0f;
}

// Gradients of one tile of keys.
struct TileGradients {
  float *key, *value;    // [kKeyTile, stride]
  Vec weight[kKeyTile];  // the gradient of a weight is the sum over the lanes
};

// Keys and values of a tile: `key` and `value` are operands of sums over head_dim, `key_over_keys` of sums over keys.
template <class T>
struct TileRows {
  KeyRows<T> key, key_over_keys, value;
};

// Scratch memory of a tile and a block, [kKeyTile, rows] each. Probabilities become operands of sums
// over rows in place. Gradients of logits are needed as operands both of sums over rows and of sums
// over keys; operands of two values differ there, so those of sums over rows have memory of their own,
// grad_logits_rows, which else is grad_logits.
template <class T>
struct TileScratch {
  float *probability, *grad_logits, *factor;
  T* grad_logits_rows;
};

// Adds one block of query rows to the gradients of a tile, and the tile to grad_query. For a tile of
// removed keys (weight 0) it computes only the gradients of the weights.
template <class T>
inline void attend_backward(const AttentionBackward& g, const KeyTile& tile, bool removed, const TileRows<T>& tile_rows,
                            const Dropout& dropout, int64_t position, Block block, const QueryRows<T>& packed,
                            const TileScratch<T>& scratch, TileGradients& gradients, PrefetchQueue& prefetches) {
  const Attention& a = g.forward;
  const int64_t query = block.first, rows = block.rows(), dim = a.head_dim, stride = round_up(dim);
  const Staircase stairs(tile, a.causal, position, block.vecs);
  if (stairs.count == 0) return;
  const auto& [key, key_over_keys, value] = tile_rows;
  const auto& [probability, grad_logits, factor, grad_logits_rows] = scratch;
  const T* query_transposed = packed.query_transposed + query * operands<T>(dim);
  const T* grad_output_transposed = packed.grad_output_transposed + query * operands<T>(dim);
  const Vec scale = splat(a.scale * kLog2E);
  const InRuns depth{{operands<T>(dim)}};
  if (dropout.active()) dropout_factors(dropout, tile, stairs.step[stairs.count - 1].end, query, rows, factor);
  for (const Step& step : stairs) {
    const int64_t lane = step.first_vec * kWidth, vecs = block.vecs - step.first_vec, keys = step.end - step.begin;
    matmul(keys, vecs, depth, Overwrite{}, key.data + step.begin * key.stride, key.stride, 1, query_transposed + lane,
           rows, probability + step.begin * rows + lane, rows, prefetches);
    matmul(keys, vecs, depth, Overwrite{}, value.data + step.begin * value.stride, value.stride, 1,
           grad_output_transposed + lane, rows, grad_logits + step.begin * rows + lane, rows, prefetches);
    for (int64_t j = step.begin; j < step.end; ++j) {
      float *p = probability + j * rows, *grad = grad_logits + j * rows;
      const Vec w = splat(tile.factor[j]);
      for (int64_t i = lane; i < rows; i += kWidth) {
        const Vec relative = logit(load(p + i), scale, tile.power[j]) - load(packed.maximum + query + i);
        const Vec inverse = load(packed.inverse + query + i);
        Vec e = removed ? exp2(capped(relative + log2(inverse))) : exp2(relative) * inverse;
        if (step.ragged && i == lane) e = seen(tile, j, step, position) ? e : Vec{};
        const Vec z = dropout.active() ? load(factor + tile.place[j] * rows + i) : splat(1.0f);
        const Vec centred = e * (z * load(grad + i) - load(packed.delta + query + i));
        gradients.weight[j] += centred;
        store_along_row(reinterpret_cast<T*>(p), i, w * e * z);
        store(grad + i, w * centred);
        if constexpr (kValues<T> == 2) store_along_row(grad_logits_rows + j * rows, i, w * centred);
      }
    }
  }
  if (removed) return;
  for (const Step& step : stairs) {
    // Queries before the step's first vector do not see its keys, so the sums over queries begin there.
    const int64_t lane = step.first_vec * kWidth, keys = step.end - step.begin;
    const int64_t place = step.begin * rows + operands<T>(lane);
    const T* queries = packed.query + operands<T>(query + lane) * stride;
    const T* grad_output = packed.grad_output + operands<T>(query + lane) * stride;
    const int64_t columns = stride / kWidth;
    const Equal queries_left{operands<T>(rows - lane)};
    const T *p = reinterpret_cast<const T*>(probability) + place, *grad = grad_logits_rows + place;
    matmul(keys, columns, queries_left, Add{}, p, rows, 1, grad_output, stride, gradients.value + step.begin * stride,
           stride, prefetches);
    matmul(keys, columns, queries_left, Add{}, grad, rows, 1, queries, stride, gradients.key + step.begin * stride,
           stride, prefetches);
  }
  T* grad_logits_over_keys = reinterpret_cast<T*>(grad_logits);
  for (int64_t lane = 0; kValues<T> == 2 && lane < rows; lane += kWidth) {
    const auto values = [&](int64_t j) { return load(grad_logits + j * rows + lane); };
    store_over_rows(stairs.keys[lane / kWidth], values, grad_logits_over_keys + lane, rows);
  }
  matmul(dim, block.vecs, Rising<T>{stairs.keys}, Add{}, key_over_keys.data, 1, key_over_keys.stride,
         grad_logits_over_keys, rows, packed.grad_query + query * dim, rows, prefetches);
}

// How the work is divided: the tiles of each key head are divided among `parts` tasks, each of which
// sums its own grad_query.
struct BackwardPlan {
  const AttentionBackward& g;
  int64_t parts;
  float* partial;  // [batch, head, part, query rows of the longest sequence, head_dim]; null where parts is 1
  int64_t partial_size;

  float* partial_at(int64_t batch, int64_t head, int64_t part) const {
    return partial + ((batch * g.forward.num_heads + head) * parts + part) * partial_size;
  }
};

// Stores grad_query of one head, which has the layout of QueryRows::grad_query, in the tensor.
inline void unpack_grad_query(const AttentionBackward& g, const Sequence& s, int64_t batch, int64_t head,
                              const Blocks& blocks, const float* grad_query) {
  const Attention& a = g.forward;
  const int64_t offset = batch * g.grad_query.batch + head * g.grad_query.head + s.query_begin * g.grad_query.row;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    const int64_t left = s.num_queries - block.first, rows = left < block.rows() ? left : block.rows();
    unpack_transposed(
        grad_query + block.first * a.head_dim, block.rows(), rows, a.head_dim, [&](int64_t) { return splat(a.scale); },
        g.grad_query, a.dtype, offset + block.first * g.grad_query.row);
  }
}

// One task: computes the gradients of every parts-th tile of keys of a key head, beginning with tile
// `part`, and its grad_query.
template <class T>
inline void backward_keys(const BackwardPlan& plan, int64_t batch, int64_t key_head, int64_t part,
                          PrefetchQueue& prefetches) {
  const AttentionBackward& g = plan.g;
  const Attention& a = g.forward;
  const Sequence s = sequence(a, batch);
  const int64_t dim = a.head_dim, stride = round_up(dim);
  const int64_t group = a.num_heads / a.num_key_heads, first_head = key_head * group;
  const Blocks blocks(s.num_queries);
  const int64_t rows = blocks.rows(), size = QueryRows<T>::size(rows, dim);

  constexpr int64_t kExtra = kValues<T> - 1;  // 1 for operands of two values, which need one more array of each kind
  float* scratch =
      thread_scratch(group * size + (6 + kExtra) * kKeyTile * stride + (3 + kExtra) * kKeyTile * kMostVecs * kWidth);
  const auto queries = [&](int64_t member) { return QueryRows<T>(scratch + member * size, rows, dim); };
  T* key = reinterpret_cast<T*>(scratch + group * size);
  T* value = key + kKeyTile * stride;
  // grad_key and grad_value are sums over all heads, for every key of the tile's range. The arrays
  // some_... hold the sums of one head, for the keys that take part, if some of the range do not.
  float* grad_key = reinterpret_cast<float*>(value + kKeyTile * stride);
  float* grad_value = grad_key + kKeyTile * stride;
  float* some_grad_key = grad_value + kKeyTile * stride;
  float* some_grad_value = some_grad_key + kKeyTile * stride;
  constexpr int64_t kTileSize = kKeyTile * kMostVecs * kWidth;
  float* probability = some_grad_value + kKeyTile * stride;
  float* grad_logits = probability + kTileSize;
  float* factor = grad_logits + kTileSize;
  T* grad_logits_rows = reinterpret_cast<T*>(kValues<T> == 1 ? grad_logits : factor + kTileSize);
  const TileScratch<T> tile_scratch{probability, grad_logits, factor, grad_logits_rows};
  T* key_over_keys = reinterpret_cast<T*>(factor + (1 + kExtra) * kTileSize);

  // The memory of the gradients is not in use yet: while queries are packed, it is their scratch memory.
  static_assert(2 * kMostVecs * kWidth <= 4 * kKeyTile);
  for (int64_t member = 0; member < group; ++member) {
    pack_queries(g, s, batch, first_head + member, blocks, queries(member), grad_key);
  }
  const auto offset = [&](const Matrices& m) { return batch * m.batch + key_head * m.head + s.key_begin * m.row; };
  for (int64_t first = part * kKeyTile; first < s.num_keys; first += plan.parts * kKeyTile) {
    const int64_t keys = s.num_keys - first < kKeyTile ? s.num_keys - first : kKeyTile;
    for (int64_t i = 0; i < keys * stride; ++i) grad_key[i] = grad_value[i] = 0.0f;
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = first_head + member;
      const Dropout dropout(a, batch, head);
      const float* weight = a.weight.data + batch * a.weight.batch + head * a.weight.head + s.key_begin;
      const bool* key_mask =
          g.key_mask == nullptr ? nullptr : g.key_mask + batch * g.key_mask_batch + s.key_begin + first;
      float* grad_weight = nullptr;
      if (g.grad_weight.data != nullptr) {
        grad_weight =
            g.grad_weight.data + batch * g.grad_weight.batch + head * g.grad_weight.head + s.key_begin + first;
        for (int64_t j = 0; j < keys; ++j) grad_weight[j] = 0.0f;
      }
      constexpr bool kPasses[] = {false, true};
      for (const bool removed : kPasses) {
        if (removed && grad_weight == nullptr) continue;
        const KeyTile tile(weight, first, keys, [&](int64_t j, float w) {
          return removed ? w == 0.0f && (key_mask == nullptr || key_mask[j]) : w > 0.0f;
        });
        if (tile.count == 0) continue;
        const bool every = tile.count == keys;
        const int64_t readers = blocks.count * group;
        TileRows<T> tile_rows{tile.rows<SumOver::kHeadDim>(a.key, a.dtype, offset(a.key), dim, readers, key),
                              {},
                              tile.rows<SumOver::kHeadDim>(a.value, a.dtype, offset(a.value), dim, readers, value)};
        tile_rows.key_over_keys = kValues<T> == 1
                                      ? tile_rows.key
                                      : tile.pack<SumOver::kKeys>(a.key, a.dtype, offset(a.key), dim, key_over_keys);
        TileGradients gradients{every ? grad_key : some_grad_key, every ? grad_value : some_grad_value, {}};
        for (int64_t i = 0; !every && i < tile.count * stride; ++i) gradients.key[i] = gradients.value[i] = 0.0f;
        for (int64_t i = 0; i < blocks.count; ++i) {
          const Block block = blocks[i];
          attend_backward(g, tile, removed, tile_rows, dropout, block.first + s.offset, block, queries(member),
                          tile_scratch, gradients, prefetches);
        }
        for (int64_t j = 0; grad_weight != nullptr && j < tile.count; ++j) {
          grad_weight[tile.place[j]] = __builtin_ldexpf(sum(gradients.weight[j]), -static_cast<int>(tile.power[j]));
        }
        for (int64_t j = 0; !every && !removed && j < tile.count; ++j) {
          for (int64_t d = 0; d < stride; d += kWidth) {
            float *k = grad_key + tile.place[j] * stride + d, *v = grad_value + tile.place[j] * stride + d;
            store(k, load(k) + load(gradients.key + j * stride + d));
            store(v, load(v) + load(gradients.value + j * stride + d));
          }
        }
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      store_row(g.grad_key, a.dtype, offset(g.grad_key) + (first + j) * g.grad_key.row, dim, a.scale,
                grad_key + j * stride);
      store_row(g.grad_value, a.dtype, offset(g.grad_value) + (first + j) * g.grad_value.row, dim, 1.0f,
                grad_value + j * stride);
    }
  }

  for (int64_t member = 0; member < group; ++member) {
    const float* grad_query = queries(member).grad_query;
    if (plan.parts == 1) {
      unpack_grad_query(g, s, batch, first_head + member, blocks, grad_query);
    } else {
      float* partial = plan.partial_at(batch, first_head + member, part);
      for (int64_t i = 0; i < rows * dim; ++i) partial[i] = grad_query[i];
    }
  }
}

// Adds up grad_query of one head over the parts, in their order, and stores it.
inline void sum_grad_query(const BackwardPlan& plan, int64_t batch, int64_t head) {
  const Attention& a = plan.g.forward;
  const Sequence s = sequence(a, batch);
  const Blocks blocks(s.num_queries);
  float* total = plan.partial_at(batch, head, 0);
  for (int64_t part = 1; part < plan.parts; ++part) {
    const float* other = plan.partial_at(batch, head, part);
    for (int64_t i = 0; i < blocks.rows() * a.head_dim; ++i) total[i] += other[i];
  }
  unpack_grad_query(plan.g, s, batch, head, blocks, total);
}

template <class T>
inline void backward_as(const AttentionBackward& g, ParallelFor parallel_for) {
  const Attention& a = g.forward;
  // The tiles of few key heads are divided among several tasks. Their number depends on the problem
  // alone, so that results do not depend on the number of threads.
  constexpr int64_t kTasks = 16, kFewestTiles = 4;
  const int64_t heads = a.batch * a.num_key_heads, tiles = (a.num_keys + kKeyTile - 1) / kKeyTile;
  if (heads == 0) return;
  BackwardPlan plan{g, clamped(kTasks / heads, 1, tiles < kFewestTiles ? 1 : tiles / kFewestTiles), nullptr, 0};
  if (plan.parts > 1) plan.partial_size = round_up(a.num_queries) * a.head_dim;
  const Memory partial(a.batch * a.num_heads * plan.parts * plan.partial_size);
  plan.partial = partial.data;
  parallel_for(
      heads * plan.parts,
      [](void* pointer, int64_t index, int64_t next) {
        const BackwardPlan& p = *static_cast<const BackwardPlan*>(pointer);
        const Attention& f = p.g.forward;
        const int64_t batch_key_head = index / p.parts, next_batch_key_head = next < 0 ? -1 : next / p.parts;
        PrefetchQueue prefetches(f);
        if (next_batch_key_head >= 0) {
          const int64_t batch = next_batch_key_head / f.num_key_heads, key_head = next_batch_key_head % f.num_key_heads;
          const int64_t head = key_head * (f.num_heads / f.num_key_heads);
          const Sequence s = sequence(f, batch);
          const Matrices* const of_queries[] = {&f.query, &f.output, &p.g.grad_output, &p.g.grad_query};
          const Matrices* const of_keys[] = {&f.key, &f.value, &p.g.grad_key, &p.g.grad_value};
          for (const Matrices* m : of_queries) prefetches.add(*m, batch, head, s.query_begin, s.num_queries);
          for (const Matrices* m : of_keys) prefetches.add(*m, batch, key_head, s.key_begin, s.num_keys);
        }
        backward_keys<T>(p, batch_key_head / f.num_key_heads, batch_key_head % f.num_key_heads, index % p.parts,
                         prefetches);
      },
      &plan);
  if (plan.parts == 1) return;
  parallel_for(
      a.batch * a.num_heads,
      [](void* pointer, int64_t index, int64_t) {
        const BackwardPlan& p = *static_cast<const BackwardPlan*>(pointer);
        sum_grad_query(p, index / p.g.forward.num_heads, index % p.g.forward.num_heads);
      },
      &plan);
}

// Returns the number of query rows of all heads together.
inline int64_t rows_of_heads(const Attention& a) {
  return (a.cu_queries != nullptr ? 1 : a.batch) * a.num_heads * a.total_queries;
}
// Returns how many floats per query row recompute_forward needs: for output, rounding, maximum and total.
inline int64_t floats_per_row(const Attention& a) { return 2 * a.head_dim + 2; }

// Returns the problem with the results of the forward pass recomputed by the general kernel, in
// `memory`. It is used where the forward pass decoded: decoding sums logits in another order than the
// backward pass, so their terms differ in their last bits and would not sum to the stored total. With
// operands of two bf16 values the output of decoding is kept, as decoding does not round probabilities.
template <class T>
inline Attention recompute_forward(const Attention& a, float* memory, ParallelFor parallel_for) {
  const int64_t rows = rows_of_heads(a), dim = a.head_dim;
  const int64_t head = a.total_queries, batch = a.cu_queries != nullptr ? 0 : a.num_heads * head;
  Attention recomputed = a;
  recomputed.output = {memory, batch * dim, head * dim, dim};
  if (a.dtype != DType::kFloat32) recomputed.rounding = {memory + rows * dim, batch * dim, head * dim, dim};
  recomputed.maximum = {memory + 2 * rows * dim, batch, head};
  recomputed.total = {recomputed.maximum.data + rows, batch, head};
  forward_as<T>(recomputed, parallel_for);
  if (kValues<T> > 1) {
    recomputed.output = a.output;
    recomputed.rounding = a.rounding;
  }
  return recomputed;
}

inline void backward(const AttentionBackward& g, ParallelFor parallel_for) {
  with_operands(g.forward.dtype, [&]<class T>() {
    if (!decodes(g.forward)) return backward_as<T>(g, parallel_for);
    const Memory memory(rows_of_heads(g.forward) * floats_per_row(g.forward));
    AttentionBackward recomputed = g;
    recomputed.forward = recompute_forward<T>(g.forward, memory.data, parallel_for);
    backward_as<T>(recomputed, parallel_for);
  });
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
