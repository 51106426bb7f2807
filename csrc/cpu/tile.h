// The tile that both passes work on: up to kKeyTile keys by a block of query rows. Queries run along
// the lanes of vectors, so that the softmax over keys needs no sum across lanes. Keys that do not take
// part are left out of the tile.
#pragma once

#include "convert.h"
#include "dropout.h"

namespace empcause::cpu::EMPCAUSE_ISA {

constexpr int64_t kKeyTile = 64;
// The most vectors of query rows in a block. The backward pass sums over the rows of a block, and
// longer sums are faster.
constexpr int64_t kMostVecs = 6;

// Rows of keys and values are read from the tensor without a copy if at most this many blocks of queries read them.
// Rows that are far from each other displace each other from the cache, so for more readers a copy is faster.
constexpr int64_t kFewReaders = 4;

// From this weight on, a weight's power of two is added to the logit instead of multiplying the probability.
// Sums of smaller weights cannot overflow, and no weight is too small, as 1 + x in fp32 is 0 or at least 2^-24.
constexpr float kLargeWeight = 0x1p32f;

// The dimension that a product sums over; the values of an operand are neighbours along it.
enum class SumOver { kHeadDim, kKeys };

// Rows of operands of keys or values, `stride` operands apart. A row belongs to one key, or, in sums
// over keys with two values per operand, to two neighbouring keys of the tile.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;
};

// Those keys of a range of at most kKeyTile neighbouring ones that take part, in their order.
struct KeyTile {
  int64_t first, count = 0;
  int64_t place[kKeyTile];  // key j of the tile is key first + place[j] of the sequence
  // The weight of a key is factor * 2^power; power is 0 for weights below kLargeWeight.
  float factor[kKeyTile], power[kKeyTile];

  // Takes the keys of [first_key, first_key + keys) for which take(place, weight) holds.
  template <class Take>
  KeyTile(const float* weights, int64_t first_key, int64_t keys, Take take) : first(first_key) {
    bool all = true;  // the common case, whose loop has no branch per key
    for (int64_t j = 0; j < keys; ++j) {
      place[j] = j;
      all &= take(j, weights[first + j]);
    }
    count = all ? keys : 0;
    for (int64_t j = 0; !all && j < keys; ++j) {
      if (!take(j, weights[first + j])) continue;
      place[count++] = j;
    }
    for (int64_t j = 0; j < round_up(count); ++j) {
      const float w = j < count ? weights[first + place[j]] : 0.0f;
      const uint32_t bits = __builtin_bit_cast(uint32_t, w);
      const bool large = w >= kLargeWeight;
      factor[j] = large ? __builtin_bit_cast(float, (bits & 0x7fffffu) | 0x3f800000u) : w;
      power[j] = large ? static_cast<float>(static_cast<int32_t>(bits >> 23) - 127) : 0.0f;
    }
  }

  // Returns how many keys of the tile are at `position` or before it.
  int64_t up_to(int64_t position) const {
    if (count == 0 || first + place[0] > position) return 0;
    if (first + place[count - 1] <= position) return count;
    int64_t low = 1, high = count - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (first + place[middle] <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Returns the stride of copied rows, in operands.
  template <SumOver kSum, class T>
  static int64_t row_stride(int64_t head_dim) {
    return round_up(kSum == SumOver::kKeys ? head_dim : operands<T>(head_dim));
  }

  // Copies the tile's rows of `m`, keys or values, to `out` as operands, and returns them.
  template <SumOver kSum, class T>
  KeyRows<T> pack(const Matrices& m, DType dtype, int64_t offset, int64_t head_dim, T* out) const {
    constexpr bool kJoinsTwoRows = kSum == SumOver::kKeys && kValues<T> == 2;
    const int64_t stride = row_stride<kSum, T>(head_dim);
    const auto row = [&](int64_t j) { return offset + (first + place[j]) * m.row; };
    for (int64_t j = 0; j < count; ++j) {
      prefetch_row(m, dtype, row(j) + kAhead * m.row, head_dim);
      if constexpr (!kJoinsTwoRows) load_row(m, dtype, row(j), head_dim, out + j * stride);
    }
    for (int64_t d = 0; kJoinsTwoRows && d < head_dim; d += kWidth) {
      const auto values = [&](int64_t j) { return load_values<DType::kBFloat16>(m.data, row(j) + d, head_dim - d); };
      store_over_rows(count, values, out + d, stride);
    }
    return {out, stride};
  }

  // Returns the tile's rows of `m` as operands for `readers` blocks of queries: in place if the tensor is fp32, the
  // keys are neighbours and there are at most kFewReaders readers, else packed into `out`. If `copied`, an earlier call
  // has already packed those that need it. Rows in place are prefetched here, as a product reads them a few at a time.
  template <SumOver kSum, class T>
  KeyRows<T> rows(const Matrices& m, DType dtype, int64_t offset, int64_t head_dim, int64_t readers, T* out,
                  bool copied = false) const {
    if constexpr (kValues<T> == 1) {
      const bool neighbours = count > 0 && place[count - 1] == count - 1;
      if (dtype == DType::kFloat32 && neighbours && readers <= kFewReaders) {
        for (int64_t j = 0; j < count; ++j) prefetch_row(m, dtype, offset + (first + j) * m.row, head_dim);
        return {static_cast<const float*>(m.data) + offset + first * m.row, m.row};
      }
    }
    if (copied) return {out, row_stride<kSum, T>(head_dim)};
    return pack<kSum>(m, dtype, offset, head_dim, out);
  }
};

// Keys [begin, end) of a tile that are computed together, for the query vectors from first_vec on. All
// lanes of these vectors see all of the keys, except for the first vector of a ragged step, which is
// on the diagonal: its lanes see some of them.
struct Step {
  int64_t begin, end, first_vec;
  bool ragged;
};

// A tile by a block of query rows, cut into steps. Without a causal mask there is one step of all keys
// and vectors; with one, later steps have later keys and fewer vectors.
struct Staircase {
  Step step[kMostVecs + 1];
  int count = 0;
  int64_t keys[kMostVecs];  // for each vector, how many keys of the tile at least one of its lanes sees

  // `position` is the position of the block's first query among the keys. The key at this position
  // belongs to the first ragged step, though all lanes see it: in a tile without gaps each ragged step
  // then has kWidth keys, for which products use most accumulators.
  Staircase(const KeyTile& tile, bool causal, int64_t position, int64_t vecs) {
    int64_t begin = causal ? tile.up_to(position - 1) : tile.count;
    if (begin > 0) step[count++] = {0, begin, 0, false};
    for (int64_t v = 0; causal && v < vecs && begin < tile.count; ++v) {
      const int64_t end = tile.up_to(position + (v + 1) * kWidth - 1);
      if (end > begin) step[count++] = {begin, end, v, true};
      begin = end > begin ? end : begin;
    }
    for (int64_t v = 0; v < vecs; ++v) keys[v] = causal ? tile.up_to(position + (v + 1) * kWidth - 1) : tile.count;
  }

  const Step* begin() const { return step; }
  const Step* end() const { return step + count; }
};

// Returns which lanes of a ragged step's first vector see a key of the tile.
inline IntVec seen(const KeyTile& tile, int64_t key, const Step& step, int64_t position) {
  const int64_t lane = tile.first + tile.place[key] - position - step.first_vec * kWidth;
  return lane_index() >= static_cast<int32_t>(lane);
}

// Neighbouring query rows, in whole vectors.
struct Block {
  int64_t first, vecs;

  int64_t rows() const { return vecs * kWidth; }
};

// Cuts query rows into blocks of at most kMostVecs vectors, whose sizes differ by at most one vector.
struct Blocks {
  int64_t vecs, count;

  explicit Blocks(int64_t num_rows) : vecs(round_up(num_rows) / kWidth), count((vecs + kMostVecs - 1) / kMostVecs) {}

  int64_t rows() const { return vecs * kWidth; }
  Block operator[](int64_t index) const {
    const int64_t begin = vecs * index / count, end = vecs * (index + 1) / count;
    return {begin * kWidth, end - begin};
  }
};

// Computes the dropout factors of keys [0, end) of a tile: that of key j and query row query + i is
// factor[tile.place[j] * lanes + i].
inline void dropout_factors(const Dropout& dropout, const KeyTile& tile, int64_t end, int64_t query, int64_t lanes,
                            float* factor) {
  int64_t done = -1;
  for (int64_t j = 0; j < end; ++j) {
    const int64_t block = tile.place[j] / 8;
    if (block == done) continue;
    done = block;
    dropout.block(query, lanes, tile.first / 8 + block, lanes, factor + block * 8 * lanes);
  }
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
