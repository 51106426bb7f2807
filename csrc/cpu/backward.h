// Backward pass: probabilities are computed again from the saved log-sum-exp. One task owns a key head of a batch and all
// query heads that share it, so every sum runs in a fixed order and nothing is shared between threads.
// Include inside the namespace of an instruction set only.

// e = exp(x - LSE) may overflow for a key whose weight is 0, where only the gradient of the weight uses it.
constexpr float kLargestExponent = 80.0f;

// One query row against a block of keys. In: logits and do . v. Out, in their place: b Z and dS. Adds to grad_weight.
inline void gradient_row(float* logits, float* grad_prob, const float* weight, const float* wanted, const float* factor,
                         float logsumexp, float delta, int64_t visible, int64_t columns, float* grad_weight) {
  for (int64_t j = 0; j < columns; j += kWidth) {
    const IntVec seen = lane_index() < static_cast<int32_t>(visible - j);
    const Vec w = load(weight + j), z = load(factor + j);
    const IntVec attended = seen & (w > Vec{});
    const Vec exponent = load(logits + j) - splat(logsumexp);
    const Vec e = exp(exponent > splat(kLargestExponent) ? splat(kLargestExponent) : exponent);
    const Vec centred = z * load(grad_prob + j) - splat(delta);
    if (grad_weight != nullptr) {
      const IntVec counted = seen & (load(wanted + j) > Vec{});
      store(grad_weight + j, load(grad_weight + j) + (counted ? e * centred : Vec{}));
    }
    const Vec b = w * e;
    store(logits + j, attended ? b * z : Vec{});
    store(grad_prob + j, attended ? b * centred : Vec{});
  }
}

inline void backward_key_head(const AttentionBackward& g, int64_t batch, int64_t key_head) {
  const Attention& a = g.forward;
  const Sequence s = sequence(a, batch);
  const int64_t dim = a.head_dim, stride = round_up(dim), queries = s.num_queries;
  const int64_t group = a.num_heads / a.num_key_heads, first_head = key_head * group;

  float* scratch = thread_scratch(3 * group * queries * stride + 2 * group * round_up(queries) + 2 * dim * kKeyBlock +
                                  3 * kKeyBlock * stride + 2 * kQueryBlock * kKeyBlock + 4 * kKeyBlock + stride);
  float* query = scratch;
  float* grad_output = query + group * queries * stride;
  float* grad_query = grad_output + group * queries * stride;
  float* delta = grad_query + group * queries * stride;
  float* logsumexp = delta + group * round_up(queries);
  float* key_transposed = logsumexp + group * round_up(queries);
  float* value_transposed = key_transposed + dim * kKeyBlock;
  float* key = value_transposed + dim * kKeyBlock;
  float* grad_key = key + kKeyBlock * stride;
  float* grad_value = grad_key + kKeyBlock * stride;
  float* logits = grad_value + kKeyBlock * stride;
  float* grad_prob = logits + kQueryBlock * kKeyBlock;
  float* weight = grad_prob + kQueryBlock * kKeyBlock;
  float* wanted = weight + kKeyBlock;
  float* factor = wanted + kKeyBlock;
  float* grad_weight = factor + kKeyBlock;
  float* row = grad_weight + kKeyBlock;

  for (int64_t member = 0; member < group; ++member) {
    const int64_t head = first_head + member, place = member * queries * stride;
    float* lse = logsumexp + member * round_up(queries);
    const float* saved =
        a.logsumexp.data + batch * a.logsumexp.batch + head * a.logsumexp.head + s.query_begin;
    for (int64_t i = 0; i < queries; ++i) lse[i] = saved[i];
    // Rows that see no key take no part, whatever stands in them.
    const auto alive = [lse](int64_t i) { return lse[i] != kInfinity; };
    pack_rows(a.query, a.dtype, batch * a.query.batch + head * a.query.head + s.query_begin * a.query.row, queries, dim,
              a.scale, alive, query + place);
    pack_rows(g.grad_output, a.dtype,
              batch * g.grad_output.batch + head * g.grad_output.head + s.query_begin * g.grad_output.row, queries, dim,
              1.0f, alive, grad_output + place);
    for (int64_t i = 0; i < queries; ++i) {
      load_row(a.output, a.dtype, batch * a.output.batch + head * a.output.head + (s.query_begin + i) * a.output.row, dim,
               1.0f, row);
      Vec total{};
      for (int64_t d = 0; d < stride; d += kWidth) total += load(row + d) * load(grad_output + place + i * stride + d);
      delta[member * round_up(queries) + i] = sum(total);
    }
    for (int64_t i = 0; i < queries * stride; ++i) grad_query[place + i] = 0.0f;
  }

  for (int64_t first = 0; first < s.num_keys; first += kKeyBlock) {
    const int64_t keys = s.num_keys - first < kKeyBlock ? s.num_keys - first : kKeyBlock;
    const int64_t key_row = s.key_begin + first;
    const int64_t key_offset = batch * a.key.batch + key_head * a.key.head + key_row * a.key.row;
    pack_transposed(a.key, a.dtype, key_offset, keys, dim, kKeyBlock, row, key_transposed);
    pack_transposed(a.value, a.dtype, batch * a.value.batch + key_head * a.value.head + key_row * a.value.row, keys, dim,
                    kKeyBlock, row, value_transposed);
    for (int64_t i = 0; i < keys * stride; ++i) grad_key[i] = grad_value[i] = 0.0f;
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      factor[j] = 1.0f;
      wanted[j] = j < keys && (g.key_mask == nullptr || g.key_mask[batch * g.key_mask_batch + key_row + j]) ? 1.0f : 0.0f;
    }

    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = first_head + member, place = member * queries * stride;
      const Dropout dropout(a, batch, head);
      load_weights(a.weight, batch * a.weight.batch + head * a.weight.head + key_row, keys, weight);
      pack_rows(a.key, a.dtype, key_offset, keys, dim, 1.0f, [weight](int64_t j) { return weight[j] > 0.0f; }, key);
      for (int64_t j = 0; j < kKeyBlock; ++j) grad_weight[j] = 0.0f;

      for (int64_t i = 0; i < queries; i += kQueryBlock) {
        const int64_t rows = queries - i < kQueryBlock ? queries - i : kQueryBlock;
        const int64_t visible = visible_keys(a, s, i + rows - 1, first, keys);
        if (visible == 0) continue;
        const int64_t columns = round_up(visible);
        const float* q = query + place + i * stride;
        const float* go = grad_output + place + i * stride;
        matmul<false>(rows, columns, dim, q, stride, 1, key_transposed, kKeyBlock, logits, kKeyBlock);
        matmul<false>(rows, columns, dim, go, stride, 1, value_transposed, kKeyBlock, grad_prob, kKeyBlock);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t index = member * round_up(queries) + i + r;
          if (dropout.active()) dropout.row(i + r, first / 8, (columns + 7) / 8, factor);
          gradient_row(logits + r * kKeyBlock, grad_prob + r * kKeyBlock, weight, wanted, factor, logsumexp[index],
                       delta[index], visible_keys(a, s, i + r, first, keys), columns,
                       g.grad_weight.data == nullptr ? nullptr : grad_weight);
        }
        matmul<true>(visible, stride, rows, logits, 1, kKeyBlock, go, stride, grad_value, stride);
        matmul<true>(visible, stride, rows, grad_prob, 1, kKeyBlock, q, stride, grad_key, stride);
        matmul<true>(rows, stride, visible, grad_prob, kKeyBlock, 1, key, stride, grad_query + place + i * stride, stride);
      }
      if (g.grad_weight.data != nullptr) {
        float* out = g.grad_weight.data + batch * g.grad_weight.batch + head * g.grad_weight.head + key_row;
        for (int64_t j = 0; j < keys; ++j) out[j] = grad_weight[j];
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      store_row(g.grad_key, a.dtype, batch * g.grad_key.batch + key_head * g.grad_key.head + (key_row + j) * g.grad_key.row,
                dim, 1.0f, grad_key + j * stride);
      store_row(g.grad_value, a.dtype,
                batch * g.grad_value.batch + key_head * g.grad_value.head + (key_row + j) * g.grad_value.row, dim, 1.0f,
                grad_value + j * stride);
    }
  }

  for (int64_t member = 0; member < group; ++member) {
    for (int64_t i = 0; i < queries; ++i) {
      store_row(g.grad_query, a.dtype,
                batch * g.grad_query.batch + (first_head + member) * g.grad_query.head +
                    (s.query_begin + i) * g.grad_query.row,
                dim, a.scale, grad_query + (member * queries + i) * stride);
    }
  }
}

inline void backward(const AttentionBackward& g, ParallelFor parallel_for) {
  const Task task = [](void* pointer, int64_t begin, int64_t end) {
    const AttentionBackward& gradients = *static_cast<const AttentionBackward*>(pointer);
    for (int64_t index = begin; index < end; ++index) {
      backward_key_head(gradients, index / gradients.forward.num_key_heads, index % gradients.forward.num_key_heads);
    }
  };
  parallel_for(g.forward.batch * g.forward.num_key_heads, task, const_cast<AttentionBackward*>(&g));
}
