// Forward pass: online softmax over tiles of keys, each row's keys always in the same order.
// Include inside the namespace of an instruction set only.

constexpr int64_t kForwardVecs = 6;
constexpr int64_t kBand = 192;  // query rows that are worked on together: with a tile of keys they fit the second-level cache

// A block of query rows with what is known of them so far.
struct RunningBlock {
  float* query;    // [head_dim, rows], times scale and log2(e)
  float* output;   // [head_dim, rows], unnormalised
  float* row_max;  // [rows], in powers of two
  float* row_sum;
};

// One tile of keys. `logits` [kKeyTile, rows] becomes weighted, unnormalised probabilities.
inline void attend(const Attention& a, const KeyTile& tile, const float* key, const float* value,
                   const Dropout& dropout, int64_t query, int64_t position, const Blocks& blocks, const RunningBlock& block,
                   float* logits, float* factor) {
  const int64_t rows = blocks.rows, dim = a.head_dim, stride = round_up(dim);
  const Parts parts(tile, a.causal, position, blocks.vecs);
  if (parts.count == 0) return;

  Vec best[kForwardVecs];
  for (int64_t v = 0; v < blocks.vecs; ++v) best[v] = load(block.row_max + v * kWidth);
  for (const Part& part : parts) {
    const int64_t lane = part.first_vec * kWidth;
    matmul<false>(part.end - part.begin, blocks.vecs - part.first_vec, dim, key + part.begin * stride, stride,
                                1, block.query + lane, rows, logits + part.begin * rows + lane, rows);
    for (int64_t j = part.begin; part.ragged && j < part.end; ++j) {
      float* row = logits + j * rows + lane;
      store(row, seen(tile, j, part, position) ? load(row) : splat(-kInfinity));
    }
    for (int64_t v = part.first_vec; v < blocks.vecs; ++v) {
      Vec most = best[v];
      for (int64_t j = part.begin; j < part.end; ++j) most = maximum(load(logits + j * rows + v * kWidth), most);
      best[v] = most;
    }
  }

  Vec shift[kForwardVecs], total[kForwardVecs];
  for (int64_t v = 0; v < blocks.vecs; ++v) {
    shift[v] = best[v] == splat(-kInfinity) ? Vec{} : best[v];
    const Vec correction = exp2(load(block.row_max + v * kWidth) - shift[v]);
    store(block.row_max + v * kWidth, best[v]);
    total[v] = load(block.row_sum + v * kWidth) * correction;
    if (all(correction == splat(1.0f))) continue;
    for (int64_t d = 0; d < dim; ++d) {
      float* output = block.output + d * rows + v * kWidth;
      store(output, load(output) * correction);
    }
  }
  if (dropout.active()) dropout_factors(dropout, tile, parts.part[parts.count - 1].end, query, rows, factor);
  for (const Part& part : parts) {
    for (int64_t v = part.first_vec; v < blocks.vecs; ++v) {
      const Vec maximum_shift = shift[v];
      Vec added = total[v];
      for (int64_t j = part.begin; j < part.end; ++j) {
        float* at = logits + j * rows + v * kWidth;
        Vec p = splat(tile.weight[j]) * exp2(load(at) - maximum_shift);
        added += p;
        if (dropout.active()) p *= load(factor + tile.place[j] * rows + v * kWidth);
        store(at, p);
      }
      total[v] = added;
    }
    const int64_t lane = part.first_vec * kWidth;
    matmul<true>(dim, blocks.vecs - part.first_vec, part.end - part.begin, value + part.begin * stride, 1, stride,
                               logits + part.begin * rows + lane, rows, block.output + lane, rows);
  }
  for (int64_t v = 0; v < blocks.vecs; ++v) store(block.row_sum + v * kWidth, total[v]);
}

// All keys and values of a key head in fp32, tile after tile, packed when they are first needed.
struct PackedKeys {
  float *key, *value;  // [tile, kKeyTile, stride]
  int64_t tiles = 0;

  static int64_t size(int64_t keys, int64_t stride) { return 2 * (keys + kKeyTile) * stride; }
};

// Query rows [begin, end), a band at most, of one (batch, head).
inline void forward_band(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end, const Sequence& s,
                         PackedKeys& packed, float* scratch) {
  const int64_t dim = a.head_dim, stride = round_up(dim);
  const int64_t key_head = head / (a.num_heads / a.num_key_heads);
  const Blocks blocks(end - begin, kForwardVecs);
  const int64_t rows = blocks.count * blocks.rows;
  const Dropout dropout(a, batch, head);

  float* query = scratch;
  float* output = query + dim * rows;
  float* row_max = output + dim * rows;
  float* row_sum = row_max + rows;
  float* logits = row_sum + rows;
  float* factor = logits + kKeyTile * blocks.rows;

  const auto block_at = [&](int64_t index) {
    const int64_t row = index * blocks.rows;
    return RunningBlock{query + dim * row, output + dim * row, row_max + row, row_sum + row};
  };
  const int64_t first_query = batch * a.query.batch + head * a.query.head + (s.query_begin + begin) * a.query.row;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t row = i * blocks.rows;
    pack_transposed(a.query, a.dtype, first_query + row * a.query.row, end - begin - row, blocks.rows, dim, a.scale * kLog2E,
                    [](int64_t) { return true; }, blocks.rows, block_at(i).query);
  }
  for (int64_t i = 0; i < dim * rows; ++i) output[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    row_max[i] = -kInfinity;
    row_sum[i] = 0.0f;
  }

  const int64_t first_key = batch * a.key.batch + key_head * a.key.head + s.key_begin * a.key.row;
  const int64_t first_value = batch * a.value.batch + key_head * a.value.head + s.key_begin * a.value.row;
  const float* weight = a.weight.data + batch * a.weight.batch + head * a.weight.head + s.key_begin;
  const int64_t last = a.causal ? clamped(end + s.offset, 0, s.num_keys) : s.num_keys;
  for (int64_t first = 0; first < last; first += kKeyTile) {
    const int64_t keys = s.num_keys - first < kKeyTile ? s.num_keys - first : kKeyTile;
    const KeyTile tile(weight, first, keys, [](int64_t, float w) { return w > 0.0f; });
    float *key = packed.key + first * stride, *value = packed.value + first * stride;
    if (first == packed.tiles * kKeyTile) {
      tile.pack(a.key, a.dtype, first_key, dim, key);
      tile.pack(a.value, a.dtype, first_value, dim, value);
      ++packed.tiles;
    }
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t row = begin + i * blocks.rows;
      attend(a, tile, key, value, dropout, row, row + s.offset, blocks, block_at(i), logits, factor);
    }
  }

  for (int64_t i = 0; i < blocks.count; ++i) {
    const RunningBlock block = block_at(i);
    const int64_t row = begin + i * blocks.rows;
    const int64_t block_rows = end - row < blocks.rows ? end - row : blocks.rows;
    for (int64_t r = 0; r < blocks.rows; r += kWidth) {
      const Vec total = load(block.row_sum + r);
      const Vec inverse = total > Vec{} ? splat(1.0f) / total : Vec{};  // a row without a key has output 0
      const Vec normaliser = total == total ? inverse : total;
      for (int64_t d = 0; d < dim; ++d) {
        float* o = block.output + d * blocks.rows + r;
        store(o, load(o) * normaliser);
      }
    }
    unpack_transposed(block.output, blocks.rows, block_rows, dim, 1.0f, a.output, a.dtype,
                      batch * a.output.batch + head * a.output.head + (s.query_begin + row) * a.output.row);
    float* logsumexp = a.logsumexp.data + batch * a.logsumexp.batch + head * a.logsumexp.head + s.query_begin + row;
    for (int64_t r = 0; r < block_rows; ++r) {
      const float total = block.row_sum[r];
      logsumexp[r] = total == 0.0f ? kInfinity : (block.row_max[r] + __builtin_log2f(total)) * kLn2;
    }
  }
}

// Query rows [begin, end) of all heads that share a key head.
inline void forward_rows(const Attention& a, int64_t batch, int64_t key_head, int64_t begin, int64_t end) {
  const Sequence s = sequence(a, batch);
  if (end > s.num_queries) end = s.num_queries;
  if (begin >= end) return;
  const int64_t dim = a.head_dim, stride = round_up(dim), group = a.num_heads / a.num_key_heads;
  const int64_t last = a.causal ? clamped(end + s.offset, 0, s.num_keys) : s.num_keys;
  const Blocks blocks(end - begin < kBand ? end - begin : kBand, kForwardVecs);
  const int64_t rows = blocks.count * blocks.rows;
  float* scratch = thread_scratch(PackedKeys::size(last, stride) + 2 * dim * rows + 2 * rows + 2 * kKeyTile * blocks.rows);
  PackedKeys packed{scratch, scratch + PackedKeys::size(last, stride) / 2};
  for (int64_t member = 0; member < group; ++member) {
    if (a.weight.head != 0) packed.tiles = 0;  // another head may leave out other keys
    for (int64_t row = begin; row < end; row += kBand) {
      forward_band(a, batch, key_head * group + member, row, end - row < kBand ? end : row + kBand, s, packed,
                   scratch + PackedKeys::size(last, stride));
    }
  }
}

inline void forward(const Attention& a, ParallelFor parallel_for) {
  // Few key heads are divided further, by the problem alone, so that results do not depend on the number of threads.
  constexpr int64_t kTasks = 16;
  const int64_t heads = a.batch * a.num_key_heads;
  if (heads == 0 || a.num_queries == 0) return;
  if (decodes(a)) return decode(a, parallel_for);
  const int64_t bands = (a.num_queries + kBand - 1) / kBand;
  const int64_t wanted = clamped((kTasks + heads - 1) / heads, 1, bands);
  struct Context {
    const Attention& a;
    int64_t rows, pieces;
  } context{a, (bands + wanted - 1) / wanted * kBand, 0};
  context.pieces = (a.num_queries + context.rows - 1) / context.rows;
  const Task task = [](void* pointer, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t pair = index / c.pieces, first = index % c.pieces * c.rows;
      forward_rows(c.a, pair / c.a.num_key_heads, pair % c.a.num_key_heads, first, first + c.rows);
    }
  };
  parallel_for(heads * context.pieces, task, &context);
}
