// Decoding: attention of a few queries over many keys, whose speed is bound by reading the keys. A
// tile of keys is read once for all heads that share it. If there are few key heads, their keys are
// cut into parts, which are tasks of their own; the results of the parts are merged in a fixed order.
#pragma once

#include "kernels.h"
#include "matmul.h"
#include "tile.h"

namespace empcause::cpu::EMPCAUSE_ISA {

// The result of a query row over some keys. `output` and `total` are relative to 2^maximum; `output`
// is not yet divided by `total`.
struct PartialRow {
  float *output, *maximum, *total;
};

struct DecodePlan {
  const Attention& a;
  int64_t parts, part_keys;
  float* memory;  // [batch, head, query, part, row_size]: the output of the part, its maximum and its total

  static int64_t row_size(const Attention& a) { return round_up(a.head_dim) + 2; }

  PartialRow row(int64_t batch, int64_t head, int64_t query, int64_t part) const {
    float* at = memory + (((batch * a.num_heads + head) * a.num_queries + query) * parts + part) * row_size(a);
    return {at, at + round_up(a.head_dim), at + round_up(a.head_dim) + 1};
  }
};

// Rows of keys or values of a tile, either CopiedRows or TensorRows. load_two_at returns 2 * kWidth neighbouring
// values; if kDeinterleaves, those at even places come first, as bf16 is unpacked with the least work that way.

// Rows in fp32 in scratch memory.
struct CopiedRows : KeyRows<float> {
  static constexpr bool kDeinterleaves = false;

  int64_t place(int64_t key) const { return key * stride; }
  Vec load_at(int64_t index) const { return load(data + index); }
  TwoVecs load_two_at(int64_t index) const { return {load(data + index), load(data + index + kWidth)}; }
  void prefetch(int64_t, int64_t) const {}
};

// Rows in place in a tensor; they must be whole vectors.
template <DType kType>
struct TensorRows {
  static constexpr bool kDeinterleaves = kType == DType::kBFloat16;
  const Matrices& rows;
  int64_t first;

  int64_t place(int64_t key) const { return first + key * rows.row; }
  Vec load_at(int64_t index) const { return load_values<kType>(rows.data, index); }
  TwoVecs load_two_at(int64_t index) const {
    if constexpr (kDeinterleaves) {
      const auto bits = load(reinterpret_cast<const BFloat16x2*>(static_cast<const uint16_t*>(rows.data) + index));
      return {reinterpret_cast<Vec>(bits << 16), reinterpret_cast<Vec>(bits & 0xffff0000u)};
    } else {
      return {load_at(index), load_at(index + kWidth)};
    }
  }
  void prefetch(int64_t key, int64_t size) const { prefetch_row(rows, kType, first + key * rows.row, size); }
};

// load_two and store_two load and store 2 * kWidth neighbouring fp32 values in the order in which
// Rows::load_two_at returns values.
template <class Rows>
inline TwoVecs load_two(const float* p) {
  const Vec a = load(p), b = load(p + kWidth);
  return Rows::kDeinterleaves ? deinterleave(a, b) : TwoVecs{a, b};
}

template <class Rows>
inline void store_two(float* p, Vec a, Vec b) {
  const TwoVecs two = Rows::kDeinterleaves ? interleave(a, b) : TwoVecs{a, b};
  store(p, two.a);
  store(p + kWidth, two.b);
}

// How many keys ahead of its use a key is prefetched: about the latency of memory.
constexpr int64_t kAheadKeys = 32;

// Computes logits[j] = query . key_j, kWidth keys at a time; logits beyond the last key are undefined.
// Prefetches the values too.
template <class Rows>
inline void logits_of_row(const float* query, const Rows& key, const Rows& value, int64_t keys, int64_t stride,
                          float* logits) {
  for (int64_t first = 0; first < keys; first += kWidth) {
    const int64_t last = keys - first - 1;
    for (int64_t j = first; j < first + kWidth; ++j) {
      key.prefetch(j + kAheadKeys, stride);
      value.prefetch(j, stride);
    }
    int64_t place[kWidth];
    Vec products[kWidth];
    for (int j = 0; j < kWidth; ++j) {
      place[j] = key.place(first + (j < last ? j : last));
      products[j] = Vec{};
    }
    int64_t d = 0;
    for (; d + 2 * kWidth <= stride; d += 2 * kWidth) {
      const TwoVecs q = load_two<Rows>(query + d);
      for (int j = 0; j < kWidth; ++j) {
        const TwoVecs k = key.load_two_at(place[j] + d);
        products[j] += q.a * k.a;
        products[j] += q.b * k.b;
      }
    }
    if (d < stride) {
      const Vec q = load(query + d);
      for (int j = 0; j < kWidth; ++j) products[j] += q * key.load_at(place[j] + d);
    }
    store(logits + first, sums(products));
  }
}

// Updates kVecs vectors of the output, from dimension d on: output = output * correction + sum_j
// probability[j] * value_j.
template <int kVecs, class Rows>
inline void add_values(const float* probability, const Rows& value, int64_t keys, int64_t d, Vec correction,
                       float* output) {
  TwoVecs acc[kVecs / 2];
  EMPCAUSE_UNROLLED for (int v = 0; v < kVecs / 2; ++v) {
    acc[v] = load_two<Rows>(output + 2 * v * kWidth);
    acc[v].a *= correction;
    acc[v].b *= correction;
  }
  for (int64_t j = 0; j < keys; ++j) {
    const Vec p = splat(probability[j]);
    const int64_t place = value.place(j) + d;
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs / 2; ++v) {
      const TwoVecs values = value.load_two_at(place + 2 * v * kWidth);
      acc[v].a += p * values.a;
      acc[v].b += p * values.b;
    }
  }
  EMPCAUSE_UNROLLED for (int v = 0; v < kVecs / 2; ++v) store_two<Rows>(output + 2 * v * kWidth, acc[v].a, acc[v].b);
}

// add_values for one vector of the output.
template <class Rows>
inline void add_values_of_one_vec(const float* probability, const Rows& value, int64_t keys, int64_t d, Vec correction,
                                  float* output) {
  Vec acc = load(output) * correction;
  for (int64_t j = 0; j < keys; ++j) acc += splat(probability[j]) * value.load_at(value.place(j) + d);
  store(output, acc);
}

// Adds the first `keys` keys of a tile to the result of one query row.
template <class Rows>
inline void attend_row(const KeyTile& tile, int64_t keys, const float* query, const Rows& key, const Rows& value,
                       int64_t stride, float* logits, PartialRow row) {
  logits_of_row(query, key, value, keys, stride, logits);
  Vec best = splat(*row.maximum);
  for (int64_t j = 0; j < keys; j += kWidth) {
    const Vec x =
        lane_index() < static_cast<int32_t>(keys - j) ? load(logits + j) + load(tile.power + j) : splat(-kInfinity);
    store(logits + j, x);
    best = maximum(x, best);
  }
  float new_maximum = best[0];
  for (int i = 1; i < kWidth; ++i) new_maximum = best[i] > new_maximum ? best[i] : new_maximum;
  const Vec shift = splat(new_maximum == -kInfinity ? 0.0f : new_maximum);
  const Vec correction = exp2(splat(*row.maximum) - shift);
  Vec total{};
  for (int64_t j = 0; j < keys; j += kWidth) {
    const Vec p = load(tile.factor + j) * exp2(load(logits + j) - shift);
    store(logits + j, p);
    total += p;
  }
  *row.maximum = new_maximum;
  *row.total = *row.total * correction[0] + sum(total);
  int64_t d = 0;
  for (; d + 8 * kWidth <= stride; d += 8 * kWidth) add_values<8>(logits, value, keys, d, correction, row.output + d);
  for (; d + 4 * kWidth <= stride; d += 4 * kWidth) add_values<4>(logits, value, keys, d, correction, row.output + d);
  for (; d + 2 * kWidth <= stride; d += 2 * kWidth) add_values<2>(logits, value, keys, d, correction, row.output + d);
  if (d < stride) add_values_of_one_vec(logits, value, keys, d, correction, row.output + d);
}

// Computes the results of one part of the keys for all queries of the heads that share a key head.
inline void decode_part(const DecodePlan& plan, int64_t batch, int64_t key_head, int64_t part) {
  const Attention& a = plan.a;
  const Sequence s = sequence(a, batch);
  const int64_t dim = a.head_dim, stride = round_up(dim), group = a.num_heads / a.num_key_heads;
  float* scratch = thread_scratch(group * s.num_queries * stride + 2 * kKeyTile * stride + kKeyTile);
  float* query = scratch;
  float* key = query + group * s.num_queries * stride;
  float* value = key + kKeyTile * stride;
  float* logits = value + kKeyTile * stride;
  for (int64_t i = 0; i < group * s.num_queries; ++i) {
    const int64_t head = key_head * group + i / s.num_queries, row = i % s.num_queries;
    float* values = query + i * stride;
    load_row(a.query, a.dtype, batch * a.query.batch + head * a.query.head + (s.query_begin + row) * a.query.row, dim,
             values);
    for (int64_t d = 0; d < stride; ++d) values[d] *= a.scale * kLog2E;
    const PartialRow partial = plan.row(batch, head, row, part);
    for (int64_t d = 0; d < stride; ++d) partial.output[d] = 0.0f;
    *partial.maximum = -kInfinity;
    *partial.total = 0.0f;
  }
  const auto offset = [&](const Matrices& m) { return batch * m.batch + key_head * m.head + s.key_begin * m.row; };
  const int64_t begin = part * plan.part_keys;
  const int64_t end = clamped(a.causal ? s.num_queries + s.offset : s.num_keys, begin,
                              clamped(begin + plan.part_keys, begin, s.num_keys));
  for (int64_t first = begin; first < end; first += kKeyTile) {
    const int64_t keys = end - first < kKeyTile ? end - first : kKeyTile;
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = key_head * group + member;
      const float* weight = a.weight.data + batch * a.weight.batch + head * a.weight.head + s.key_begin;
      const KeyTile tile(weight, first, keys, [](int64_t, float w) { return w > 0.0f; });
      const auto attend_rows = [&](const auto& key_rows, const auto& value_rows) {
        for (int64_t row = 0; row < s.num_queries; ++row) {
          const int64_t visible = a.causal ? tile.up_to(row + s.offset) : tile.count;
          if (visible == 0) continue;
          attend_row(tile, visible, query + (member * s.num_queries + row) * stride, key_rows, value_rows, stride,
                     logits, plan.row(batch, head, row, part));
        }
      };
      // Rows that are read only once are not copied.
      if (group * s.num_queries == 1 && tile.count == keys && dim == stride) {
        with_dtype(a.dtype, [&]<DType kType>() {
          attend_rows(TensorRows<kType>{a.key, offset(a.key) + first * a.key.row},
                      TensorRows<kType>{a.value, offset(a.value) + first * a.value.row});
        });
        continue;
      }
      if (member == 0 || a.weight.head != 0) {
        tile.pack<SumOver::kHeadDim>(a.key, a.dtype, offset(a.key), dim, key);
        tile.pack<SumOver::kHeadDim>(a.value, a.dtype, offset(a.value), dim, value);
      }
      attend_rows(CopiedRows{{key, stride}}, CopiedRows{{value, stride}});
    }
  }
}

// Merges the results of the parts of one head in their order and stores output, maximum and total.
inline void merge_parts(const DecodePlan& plan, int64_t batch, int64_t head) {
  const Attention& a = plan.a;
  const Sequence s = sequence(a, batch);
  for (int64_t query = 0; query < s.num_queries; ++query) {
    const PartialRow merged = plan.row(batch, head, query, 0);
    float maximum = *merged.maximum;
    for (int64_t part = 1; part < plan.parts; ++part) {
      const float other = *plan.row(batch, head, query, part).maximum;
      maximum = other > maximum ? other : maximum;
    }
    const float shift = maximum == -kInfinity ? 0.0f : maximum;
    float total = 0.0f;
    for (int64_t part = 0; part < plan.parts; ++part) {
      const PartialRow row = plan.row(batch, head, query, part);
      const float factor = exp2(splat(*row.maximum - shift))[0];
      total += *row.total * factor;
      for (int64_t d = 0; d < a.head_dim; ++d) {
        merged.output[d] = part == 0 ? row.output[d] * factor : merged.output[d] + row.output[d] * factor;
      }
    }
    const int64_t row = s.query_begin + query;
    store_row(a.output, a.dtype, a.output.offset(batch, head, row), a.head_dim, total == 0.0f ? 0.0f : 1.0f / total,
              merged.output, a.rounding, a.rounding.offset(batch, head, row));
    a.maximum.of(batch, head)[row] = maximum;
    a.total.of(batch, head)[row] = total;
  }
}

// Returns whether the forward pass decodes: where at least half the lanes of a vector of query rows would be empty.
inline bool decodes(const Attention& a) {
  return a.batch * a.num_key_heads > 0 && a.num_queries > 0 && a.num_queries * 2 <= kWidth && a.dropout_p == 0.0;
}

inline void decode(const Attention& a, ParallelFor parallel_for) {
  constexpr int64_t kTasks = 16, kSmallestPart = 4 * kKeyTile;
  const int64_t heads = a.batch * a.num_key_heads;
  const int64_t most = (a.num_keys + kSmallestPart - 1) / kSmallestPart;
  DecodePlan plan{a, clamped((kTasks + heads - 1) / heads, 1, most > 0 ? most : 1), 0, nullptr};
  plan.part_keys = ((a.num_keys + plan.parts - 1) / plan.parts + kKeyTile - 1) / kKeyTile * kKeyTile;
  const Memory memory(a.batch * a.num_heads * a.num_queries * plan.parts * DecodePlan::row_size(a));
  plan.memory = memory.data;
  parallel_for(
      heads * plan.parts,
      [](void* pointer, int64_t index, int64_t) {
        const DecodePlan& p = *static_cast<const DecodePlan*>(pointer);
        const int64_t batch_key_head = index / p.parts;
        decode_part(p, batch_key_head / p.a.num_key_heads, batch_key_head % p.a.num_key_heads, index % p.parts);
      },
      &plan);
  for (int64_t i = 0; i < a.batch * a.num_heads; ++i) merge_parts(plan, i / a.num_heads, i % a.num_heads);
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
