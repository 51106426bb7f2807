// Forward pass: online softmax over blocks of keys, each row's keys always in the same order.
// Include inside the namespace of an instruction set only.

constexpr int64_t kQueryBlock = 24, kKeyBlock = 128;

inline IntVec lane_index() {
  IntVec index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  return index;
}

// How many keys of the block that starts at `first_key` a query may see, before clipping to the block.
inline int64_t visible_keys(const Attention& a, const Sequence& s, int64_t query, int64_t first_key, int64_t keys) {
  const int64_t limit = a.causal ? query + s.offset - first_key + 1 : keys;
  return limit < 0 ? 0 : limit < keys ? limit : keys;
}

// Copies the weights of a block of keys, zero-padded to whole vectors, so that padding is one more masked key.
inline void load_weights(const Rows& weight, int64_t offset, int64_t keys, float* out) {
  for (int64_t j = 0; j < keys; ++j) out[j] = weight.data[offset + j];
  for (int64_t j = keys; j < round_up(keys); ++j) out[j] = 0.0f;
}

// Turns one row of logits into weighted, unnormalised probabilities; updates the row's maximum and sum.
// Returns the factor that what was accumulated under the old maximum must be multiplied with.
inline float softmax_row(float* logits, const float* weight, int64_t visible, int64_t columns, float& row_max,
                         float& row_sum) {
  Vec best = splat(-kInfinity);
  for (int64_t j = 0; j < columns; j += kWidth) {
    const Vec x = load(logits + j), w = load(weight + j);
    const IntVec attended = (lane_index() < static_cast<int32_t>(visible - j)) & (w > Vec{});
    const Vec masked = attended ? x : splat(-kInfinity);  // also drops NaN standing in a masked key
    store(logits + j, masked);
    best = masked > best ? masked : best;
  }
  const float old_max = row_max, block_max = maximum(best);
  row_max = block_max > old_max ? block_max : old_max;
  const Vec shift = splat(row_max == -kInfinity ? 0.0f : row_max);
  Vec total{};
  for (int64_t j = 0; j < columns; j += kWidth) {
    const Vec p = load(weight + j) * exp(load(logits + j) - shift);
    store(logits + j, p);
    total += p;
  }
  const float correction = row_max == old_max ? 1.0f : exp(splat(old_max) - shift)[0];
  row_sum = row_sum * correction + sum(total);
  return correction;
}

// Query rows [begin, end) of one (batch, head).
inline void forward_rows(const Attention& a, int64_t batch, int64_t head, int64_t begin, int64_t end) {
  const Sequence s = sequence(a, batch);
  if (end > s.num_queries) end = s.num_queries;
  if (begin >= end) return;
  const int64_t rows = end - begin, dim = a.head_dim, stride = round_up(dim);
  const int64_t key_head = head / (a.num_heads / a.num_key_heads);
  const Dropout dropout(a, batch, head);

  float* scratch = thread_scratch(2 * rows * stride + 2 * round_up(rows) + dim * kKeyBlock + kKeyBlock * stride +
                                  kQueryBlock * kKeyBlock + 2 * kKeyBlock + stride);
  float* query = scratch;
  float* output = query + rows * stride;
  float* row_max = output + rows * stride;
  float* row_sum = row_max + round_up(rows);
  float* key_transposed = row_sum + round_up(rows);
  float* value = key_transposed + dim * kKeyBlock;
  float* logits = value + kKeyBlock * stride;
  float* weight = logits + kQueryBlock * kKeyBlock;
  float* factor = weight + kKeyBlock;
  float* row = factor + kKeyBlock;

  const auto all = [](int64_t) { return true; };
  const int64_t query_offset = batch * a.query.batch + head * a.query.head + (s.query_begin + begin) * a.query.row;
  pack_rows(a.query, a.dtype, query_offset, rows, dim, a.scale, all, query);
  for (int64_t i = 0; i < rows * stride; ++i) output[i] = 0.0f;
  for (int64_t i = 0; i < rows; ++i) {
    row_max[i] = -kInfinity;
    row_sum[i] = 0.0f;
  }

  for (int64_t first = 0; first < s.num_keys; first += kKeyBlock) {
    if (visible_keys(a, s, end - 1, first, 1) == 0) break;
    const int64_t keys = s.num_keys - first < kKeyBlock ? s.num_keys - first : kKeyBlock;
    const int64_t key_row = s.key_begin + first;
    load_weights(a.weight, batch * a.weight.batch + head * a.weight.head + key_row, keys, weight);
    pack_transposed(a.key, a.dtype, batch * a.key.batch + key_head * a.key.head + key_row * a.key.row, keys, dim,
                    kKeyBlock, row, key_transposed);
    pack_rows(a.value, a.dtype, batch * a.value.batch + key_head * a.value.head + key_row * a.value.row, keys, dim, 1.0f,
              [weight](int64_t j) { return weight[j] > 0.0f; }, value);

    for (int64_t i = 0; i < rows; i += kQueryBlock) {
      const int64_t block_rows = rows - i < kQueryBlock ? rows - i : kQueryBlock;
      const int64_t visible = visible_keys(a, s, begin + i + block_rows - 1, first, keys);
      if (visible == 0) continue;
      const int64_t columns = round_up(visible);
      matmul<false>(block_rows, columns, dim, query + i * stride, stride, 1, key_transposed, kKeyBlock, logits, kKeyBlock);
      for (int64_t r = 0; r < block_rows; ++r) {
        float* p = logits + r * kKeyBlock;
        const int64_t row_visible = visible_keys(a, s, begin + i + r, first, keys);
        const float correction = softmax_row(p, weight, row_visible, columns, row_max[i + r], row_sum[i + r]);
        if (correction != 1.0f) {
          float* o = output + (i + r) * stride;
          for (int64_t d = 0; d < stride; d += kWidth) store(o + d, load(o + d) * splat(correction));
        }
        if (dropout.active()) {
          dropout.row(begin + i + r, first / 8, (visible + 7) / 8, factor);
          for (int64_t j = 0; j < visible; ++j) p[j] *= factor[j];
        }
      }
      matmul<true>(block_rows, stride, visible, logits, kKeyBlock, 1, value, stride, output + i * stride, stride);
    }
  }

  for (int64_t i = 0; i < rows; ++i) {
    const bool dead = row_sum[i] == 0.0f;
    const int64_t query_row = s.query_begin + begin + i;
    store_row(a.output, a.dtype, batch * a.output.batch + head * a.output.head + query_row * a.output.row, dim,
              dead ? 0.0f : 1.0f / row_sum[i], output + i * stride);
    a.logsumexp.data[batch * a.logsumexp.batch + head * a.logsumexp.head + query_row] =
        dead ? kInfinity : row_max[i] + __builtin_logf(row_sum[i]);
  }
}

inline void forward(const Attention& a, ParallelFor parallel_for) {
  // Enough pieces to keep every thread busy, and large enough that packing keys and values is little of the work.
  constexpr int64_t kPieces = 64, kSmallestPiece = 4 * kQueryBlock;
  const int64_t pairs = a.batch * a.num_heads;
  if (pairs == 0 || a.num_queries == 0) return;
  const int64_t wanted = (kPieces + pairs - 1) / pairs;
  int64_t rows = (a.num_queries + wanted - 1) / wanted;
  rows = rows < kSmallestPiece ? kSmallestPiece : (rows + kQueryBlock - 1) / kQueryBlock * kQueryBlock;
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
