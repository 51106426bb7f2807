// Backward pass: probabilities are computed again from the saved log-sum-exp. A task owns some tiles of keys of a key head,
// and all query heads that share it, so every sum runs in a fixed order and nothing is shared between threads. grad_query
// is summed over tiles in memory of the task's own; where few heads are cut into several tasks, their sums are added in order.
// Include inside the namespace of an instruction set only.

// e = exp(x - LSE) may overflow for a key whose weight is 0, where only the gradient of the weight uses it.
constexpr float kLargestExponent = 80.0f * kLog2E;

// The query rows of one head, packed both ways; rows beyond the last are zero, and so are rows that see no key.
struct QueryRows {
  float *query, *grad_output;                        // [rows, stride]
  float *query_transposed, *grad_output_transposed;  // per block [head_dim, block rows], query times scale and log2(e)
  float *logsumexp, *delta;                          // [rows], the former in powers of two
  float* grad_query;                                 // per block [head_dim, block rows]

  static int64_t size(int64_t rows, int64_t dim) { return rows * (2 * round_up(dim) + 3 * dim + 2); }

  QueryRows(float* memory, int64_t rows, int64_t dim)
      : query(memory),
        grad_output(query + rows * round_up(dim)),
        query_transposed(grad_output + rows * round_up(dim)),
        grad_output_transposed(query_transposed + rows * dim),
        logsumexp(grad_output_transposed + rows * dim),
        delta(logsumexp + rows),
        grad_query(delta + rows) {}
};

inline void pack_queries(const AttentionBackward& g, const Sequence& s, int64_t batch, int64_t head, const Blocks& blocks,
                         const QueryRows& packed) {
  const Attention& a = g.forward;
  const int64_t dim = a.head_dim, stride = round_up(dim), rows = blocks.rows();
  const auto offset = [&](const Matrices& m) { return batch * m.batch + head * m.head + s.query_begin * m.row; };
  const int64_t query = offset(a.query), output = offset(a.output), grad_output = offset(g.grad_output);
  const float* saved = a.logsumexp.data + batch * a.logsumexp.batch + head * a.logsumexp.head + s.query_begin;
  for (int64_t i = 0; i < rows; ++i) packed.logsumexp[i] = i < s.num_queries ? saved[i] * kLog2E : kInfinity;
  // kWidth rows, and their deltas.
  const auto pack = [&]<DType kType>(int64_t first) {
    Vec delta[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      const int64_t i = first + r;
      for (const Matrices* m : {&a.query, &g.grad_output, &a.output}) prefetch_row(*m, kType, offset(*m) + (i + kAhead) * m->row, dim);
      const bool alive = packed.logsumexp[i] != kInfinity;
      const auto values = [&](const Matrices& m, int64_t begin, int64_t d) {
        return alive ? load_values<kType>(m.data, begin + i * m.row + d, dim - d) : Vec{};
      };
      delta[r] = Vec{};
      for (int64_t d = 0; d < stride; d += kWidth) {
        const Vec go = values(g.grad_output, grad_output, d);
        store(packed.query + i * stride + d, values(a.query, query, d));
        store(packed.grad_output + i * stride + d, go);
        delta[r] += values(a.output, output, d) * go;
      }
    }
    transpose(delta);
    for (int r = 1; r < kWidth; ++r) delta[0] += delta[r];
    store(packed.delta + first, delta[0]);
  };
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    with_dtype(a.dtype, [&]<DType kType>() {
      for (int64_t row = 0; row < block.rows(); row += kWidth) pack.template operator()<kType>(block.first + row);
    });
    transpose_rows(packed.query + block.first * stride, block.rows(), dim, a.scale * kLog2E, packed.query_transposed + block.first * dim);
    transpose_rows(packed.grad_output + block.first * stride, block.rows(), dim, 1.0f, packed.grad_output_transposed + block.first * dim);
  }
  for (int64_t i = 0; i < rows * dim; ++i) packed.grad_query[i] = 0.0f;
}

// Gradients of one tile of keys, [kKeyTile, stride] each but grad_weight.
struct TileGradients {
  float *key, *value;
  Vec weight[kKeyTile];  // to be summed over lanes
};

// One block of query rows. `probability` and `grad_logits` are scratch, [kKeyTile, rows]. A tile of removed keys (weight 0) only has
// gradients of its weights.
inline void attend_backward(const AttentionBackward& g, const KeyTile& tile, bool removed, KeyRows key, KeyRows value,
                            const Dropout& dropout, int64_t position, Block block, const QueryRows& packed, float* probability,
                            float* grad_logits, float* factor, TileGradients& gradients) {
  const Attention& a = g.forward;
  const int64_t query = block.first, rows = block.rows(), dim = a.head_dim, stride = round_up(dim);
  const Parts parts(tile, a.causal, position, block.vecs);
  if (parts.count == 0) return;
  const float* query_transposed = packed.query_transposed + query * dim;
  const float* grad_output_transposed = packed.grad_output_transposed + query * dim;
  if (dropout.active()) dropout_factors(dropout, tile, parts.part[parts.count - 1].end, query, rows, factor);
  for (const Part& part : parts) {
    const int64_t lane = part.first_vec * kWidth, vecs = block.vecs - part.first_vec, keys = part.end - part.begin;
    matmul(keys, vecs, Equal{dim}, Overwrite{}, key.data + part.begin * key.stride, key.stride, 1, query_transposed + lane, rows,
           probability + part.begin * rows + lane, rows);
    matmul(keys, vecs, Equal{dim}, Overwrite{}, value.data + part.begin * value.stride, value.stride, 1,
           grad_output_transposed + lane, rows, grad_logits + part.begin * rows + lane, rows);
    for (int64_t j = part.begin; j < part.end; ++j) {
      float *p = probability + j * rows, *grad = grad_logits + j * rows;
      const Vec w = splat(tile.weight[j]);
      for (int64_t i = lane; i < rows; i += kWidth) {
        const Vec exponent = load(p + i) - load(packed.logsumexp + query + i);
        Vec e = exp2(removed && exponent > splat(kLargestExponent) ? splat(kLargestExponent) : exponent);
        if (part.ragged && i == lane) e = seen(tile, j, part, position) ? e : Vec{};
        const Vec z = dropout.active() ? load(factor + tile.place[j] * rows + i) : splat(1.0f);
        const Vec centred = e * (z * load(grad + i) - load(packed.delta + query + i));
        gradients.weight[j] += centred;
        store(p + i, w * e * z);
        store(grad + i, w * centred);
      }
    }
  }
  if (removed) return;
  for (const Part& part : parts) {
    const int64_t lane = part.first_vec * kWidth, keys = part.end - part.begin;
    // Columns of zeros stand for queries before the part's first.
    const float* queries = packed.query + (query + lane) * stride;
    const float* grad_output = packed.grad_output + (query + lane) * stride;
    const int64_t columns = stride / kWidth, depth = rows - lane;
    const float *p = probability + part.begin * rows + lane, *grad = grad_logits + part.begin * rows + lane;
    matmul(keys, columns, Equal{depth}, Add{}, p, rows, 1, grad_output, stride, gradients.value + part.begin * stride, stride);
    matmul(keys, columns, Equal{depth}, Add{}, grad, rows, 1, queries, stride, gradients.key + part.begin * stride, stride);
  }
  matmul(dim, block.vecs, Rising{parts.keys}, Add{}, key.data, 1, key.stride, grad_logits, rows, packed.grad_query + query * dim, rows);
}

// How the work is divided: splits of the tiles of a key head, each with sums of grad_query of its own.
struct BackwardPlan {
  const AttentionBackward& g;
  int64_t splits;
  float* partial;  // [batch, head, split, query rows of the longest sequence, head_dim]; null where splits is 1
  int64_t partial_size;

  float* partial_at(int64_t batch, int64_t head, int64_t split) const {
    return partial + ((batch * g.forward.num_heads + head) * splits + split) * partial_size;
  }
};

inline void unpack_grad_query(const AttentionBackward& g, const Sequence& s, int64_t batch, int64_t head, const Blocks& blocks,
                              const float* grad_query) {
  const Attention& a = g.forward;
  const int64_t offset = batch * g.grad_query.batch + head * g.grad_query.head + s.query_begin * g.grad_query.row;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const Block block = blocks[i];
    const int64_t left = s.num_queries - block.first, rows = left < block.rows() ? left : block.rows();
    unpack_transposed(grad_query + block.first * a.head_dim, block.rows(), rows, a.head_dim,
                      [&](int64_t) { return splat(a.scale); }, g.grad_query, a.dtype, offset + block.first * g.grad_query.row);
  }
}

// Every splits-th tile of a key head.
inline void backward_key_head(const BackwardPlan& plan, int64_t batch, int64_t key_head, int64_t split) {
  const AttentionBackward& g = plan.g;
  const Attention& a = g.forward;
  const Sequence s = sequence(a, batch);
  const int64_t dim = a.head_dim, stride = round_up(dim);
  const int64_t group = a.num_heads / a.num_key_heads, first_head = key_head * group;
  const Blocks blocks(s.num_queries);
  const int64_t rows = blocks.rows(), size = QueryRows::size(rows, dim);

  float* scratch = thread_scratch(group * size + 6 * kKeyTile * stride + 3 * kKeyTile * kMostVecs * kWidth);
  const auto queries = [&](int64_t member) { return QueryRows(scratch + member * size, rows, dim); };
  float* key = scratch + group * size;
  float* value = key + kKeyTile * stride;
  float* grad_key = value + kKeyTile * stride;  // of all keys of a tile's range, and of all heads
  float* grad_value = grad_key + kKeyTile * stride;
  float* some_grad_key = grad_value + kKeyTile * stride;  // of those keys alone that take part
  float* some_grad_value = some_grad_key + kKeyTile * stride;
  float* probability = some_grad_value + kKeyTile * stride;
  float* grad_logits = probability + kKeyTile * kMostVecs * kWidth;
  float* factor = grad_logits + kKeyTile * kMostVecs * kWidth;

  for (int64_t member = 0; member < group; ++member) pack_queries(g, s, batch, first_head + member, blocks, queries(member));
  const auto offset = [&](const Matrices& m) { return batch * m.batch + key_head * m.head + s.key_begin * m.row; };
  for (int64_t first = split * kKeyTile; first < s.num_keys; first += plan.splits * kKeyTile) {
    const int64_t keys = s.num_keys - first < kKeyTile ? s.num_keys - first : kKeyTile;
    for (int64_t i = 0; i < keys * stride; ++i) grad_key[i] = grad_value[i] = 0.0f;
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = first_head + member;
      const Dropout dropout(a, batch, head);
      const float* weight = a.weight.data + batch * a.weight.batch + head * a.weight.head + s.key_begin;
      const bool* key_mask = g.key_mask == nullptr ? nullptr : g.key_mask + batch * g.key_mask_batch + s.key_begin + first;
      float* grad_weight = nullptr;
      if (g.grad_weight.data != nullptr) {
        grad_weight = g.grad_weight.data + batch * g.grad_weight.batch + head * g.grad_weight.head + s.key_begin + first;
        for (int64_t j = 0; j < keys; ++j) grad_weight[j] = 0.0f;
      }
      for (const bool removed : {false, true}) {
        if (removed && grad_weight == nullptr) continue;
        const KeyTile tile(weight, first, keys, [&](int64_t j, float w) {
          return removed ? w == 0.0f && (key_mask == nullptr || key_mask[j]) : w > 0.0f;
        });
        if (tile.count == 0) continue;
        const bool every = tile.count == keys;
        const KeyRows key_rows = tile.rows(a.key, a.dtype, offset(a.key), dim, blocks.count * group, key);
        const KeyRows value_rows = tile.rows(a.value, a.dtype, offset(a.value), dim, blocks.count * group, value);
        TileGradients gradients{every ? grad_key : some_grad_key, every ? grad_value : some_grad_value, {}};
        for (int64_t i = 0; !every && i < tile.count * stride; ++i) gradients.key[i] = gradients.value[i] = 0.0f;
        for (int64_t i = 0; i < blocks.count; ++i) {
          const Block block = blocks[i];
          attend_backward(g, tile, removed, key_rows, value_rows, dropout, block.first + s.offset, block, queries(member),
                          probability, grad_logits, factor, gradients);
        }
        for (int64_t j = 0; grad_weight != nullptr && j < tile.count; ++j) grad_weight[tile.place[j]] = sum(gradients.weight[j]);
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
      store_row(g.grad_key, a.dtype, offset(g.grad_key) + (first + j) * g.grad_key.row, dim, a.scale, grad_key + j * stride);
      store_row(g.grad_value, a.dtype, offset(g.grad_value) + (first + j) * g.grad_value.row, dim, 1.0f, grad_value + j * stride);
    }
  }

  for (int64_t member = 0; member < group; ++member) {
    const float* grad_query = queries(member).grad_query;
    if (plan.splits == 1) {
      unpack_grad_query(g, s, batch, first_head + member, blocks, grad_query);
    } else {
      float* partial = plan.partial_at(batch, first_head + member, split);
      for (int64_t i = 0; i < rows * dim; ++i) partial[i] = grad_query[i];
    }
  }
}

inline void sum_grad_query(const BackwardPlan& plan, int64_t batch, int64_t head) {
  const Attention& a = plan.g.forward;
  const Sequence s = sequence(a, batch);
  const Blocks blocks(s.num_queries);
  float* total = plan.partial_at(batch, head, 0);
  for (int64_t split = 1; split < plan.splits; ++split) {
    const float* other = plan.partial_at(batch, head, split);
    for (int64_t i = 0; i < blocks.rows() * a.head_dim; ++i) total[i] += other[i];
  }
  unpack_grad_query(plan.g, s, batch, head, blocks, total);
}

inline void backward(const AttentionBackward& g, ParallelFor parallel_for) {
  const Attention& a = g.forward;
  // Few key heads are divided further, by the problem alone, so that results do not depend on the number of threads.
  constexpr int64_t kTasks = 16, kFewestTiles = 4;
  const int64_t heads = a.batch * a.num_key_heads, tiles = (a.num_keys + kKeyTile - 1) / kKeyTile;
  if (heads == 0) return;
  BackwardPlan plan{g, clamped(kTasks / heads, 1, tiles < kFewestTiles ? 1 : tiles / kFewestTiles), nullptr, 0};
  std::unique_ptr<float[]> partial;
  if (plan.splits > 1) {
    plan.partial_size = round_up(a.num_queries) * a.head_dim;
    partial.reset(new float[static_cast<size_t>(a.batch * a.num_heads * plan.splits * plan.partial_size)]);
    plan.partial = partial.get();
  }
  parallel_for(
      heads * plan.splits,
      [](void* pointer, int64_t begin, int64_t end) {
        const BackwardPlan& p = *static_cast<const BackwardPlan*>(pointer);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = i / p.splits, key_heads = p.g.forward.num_key_heads;
          backward_key_head(p, pair / key_heads, pair % key_heads, i % p.splits);
        }
      },
      &plan);
  if (plan.splits == 1) return;
  parallel_for(
      a.batch * a.num_heads,
      [](void* pointer, int64_t begin, int64_t end) {
        const BackwardPlan& p = *static_cast<const BackwardPlan*>(pointer);
        for (int64_t i = begin; i < end; ++i) sum_grad_query(p, i / p.g.forward.num_heads, i % p.g.forward.num_heads);
      },
      &plan);
}
