// Forward pass: online softmax over tiles of keys, each row's keys always in the same order.
// Include inside the namespace of an instruction set only.

constexpr int64_t kForwardVecs = 3;

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
    for (int64_t j = part.begin; j < part.end; ++j) {
      float* row = logits + j * rows;
      if (part.ragged) store(row + lane, seen(tile, j, part, position) ? load(row + lane) : splat(-kInfinity));
      for (int64_t v = part.first_vec; v < blocks.vecs; ++v) best[v] = maximum(load(row + v * kWidth), best[v]);
    }
  }

  Vec shift[kForwardVecs], total[kForwardVecs];
  for (int64_t v = 0; v < blocks.vecs; ++v) {
    shift[v] = best[v] == splat(-kInfinity) ? Vec{} : best[v];
    const Vec correction = exp2(load(block.row_max + v * kWidth) - shift[v]);
    store(block.row_max + v * kWidth, best[v]);
    total[v] = load(block.row_sum + v * kWidth) * correction;
    for (int64_t d = 0; d < dim; ++d) {
      float* output = block.output + d * rows + v * kWidth;
      store(output, load(output) * correction);
    }
  }
  if (dropout.active()) dropout_factors(dropout, tile, parts.part[parts.count - 1].end, query, rows, factor);
  for (const Part& part : parts) {
    for (int64_t j = part.begin; j < part.end; ++j) {
      float* row = logits + j * rows;
      for (int64_t v = part.first_vec; v < blocks.vecs; ++v) {
        Vec p = splat(tile.weight[j]) * exp2(load(row + v * kWidth) - shift[v]);
        total[v] += p;
        if (dropout.active()) p *= load(factor + tile.place[j] * rows + v * kWidth);
        store(row + v * kWidth, p);
      }
    }
    const int64_t lane = part.first_vec * kWidth;
    matmul<true>(dim, blocks.vecs - part.first_vec, part.end - part.begin, value + part.begin * stride, 1, stride,
                               logits + part.begin * rows + lane, rows, block.output + lane, rows);
  }
  for (int64_t v = 0; v < blocks.vecs; ++v) store(block.row_sum + v * kWidth, total[v]);
}

// Query rows [begin, end) of one (batch, head).
inline void forward_rows(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  const Sequence s = sequence(a, batch);
  if (end > s.num_queries) end = s.num_queries;
  if (begin >= end) return;
  const int64_t dim = a.head_dim, stride = round_up(dim);
  const int64_t key_head = head / (a.num_heads / a.num_key_heads);
  const Blocks blocks(end - begin, kForwardVecs);
  const int64_t rows = blocks.count * blocks.rows;
  const Dropout dropout(a, batch, head);

  float* scratch = thread_scratch(2 * dim * rows + 2 * rows + 2 * kKeyTile * stride + 2 * kKeyTile * blocks.rows +
                                  kWidth * stride);
  float* query = scratch;
  float* output = query + dim * rows;
  float* row_max = output + dim * rows;
  float* row_sum = row_max + rows;
  float* key = row_sum + rows;
  float* value = key + kKeyTile * stride;
  float* logits = value + kKeyTile * stride;
  float* factor = logits + kKeyTile * blocks.rows;
  float* transposed = factor + kKeyTile * blocks.rows;

  const auto block_at = [&](int64_t index) {
    const int64_t row = index * blocks.rows;
    return RunningBlock{query + dim * row, output + dim * row, row_max + row, row_sum + row};
  };
  const int64_t first_query = batch * a.query.batch + head * a.query.head + (s.query_begin + begin) * a.query.row;
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t row = i * blocks.rows;
    pack_transposed(a.query, a.dtype, first_query + row * a.query.row, end - begin - row, blocks.rows, dim, a.scale * kLog2E,
                    [](int64_t) { return true; }, blocks.rows, transposed, block_at(i).query);
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
    const KeyTile tile(weight, first, last - first < kKeyTile ? last - first : kKeyTile,
                       [](int64_t, float w) { return w > 0.0f; });
    tile.pack(a.key, a.dtype, first_key, dim, key);
    tile.pack(a.value, a.dtype, first_value, dim, value);
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
                      batch * a.output.batch + head * a.output.head + (s.query_begin + row) * a.output.row, transposed);
    float* logsumexp = a.logsumexp.data + batch * a.logsumexp.batch + head * a.logsumexp.head + s.query_begin + row;
    for (int64_t r = 0; r < block_rows; ++r) {
      const float total = block.row_sum[r];
      logsumexp[r] = total == 0.0f ? kInfinity : (block.row_max[r] + __builtin_log2f(total)) * kLn2;
    }
  }
}

inline void forward(const Attention& a, ParallelFor parallel_for) {
  // Enough pieces to keep every thread busy, and large enough that packing keys and values is little of the work.
  constexpr int64_t kPieces = 64, kSmallestPiece = 192;
  const int64_t pairs = a.batch * a.num_heads;
  if (pairs == 0 || a.num_queries == 0) return;
  if (decodes(a)) return decode(a, parallel_for);
  const int64_t wanted = (kPieces + pairs - 1) / pairs;
  int64_t rows = (a.num_queries + wanted - 1) / wanted;
  rows = rows < kSmallestPiece ? kSmallestPiece : round_up(rows);
  struct Context {
    const Attention& a;
    int64_t rows, pieces;
  } context{a, rows, (a.num_queries + rows - 1) / rows};
  const Task task = [](void* pointer, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t pair = index / c.pieces, first = index % c.pieces * c.rows;
      forward_rows(c.a, pair / c.a.num_heads, pair % c.a.num_heads, first, first + c.rows);
    }
  };
  parallel_for(pairs * context.pieces, task, &context);
}
