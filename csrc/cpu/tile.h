// The tile that both passes work on: up to kKeyTile keys by a block of some vectors of query rows. Queries run along
// the lanes of vectors, so that the softmax over keys needs no sum across lanes, and keys that are not there are left out.
#pragma once

#include "convert.h"
#include "dropout.h"

namespace empcause::cpu::EMPCAUSE_ISA {

constexpr int64_t kKeyTile = 64;
constexpr int64_t kMostVecs = 6;  // of a block of query rows: the backward pass sums over them, so the more the better

// Rows that are far from each other displace each other from the cache: only so few blocks of queries read them uncopied.
constexpr int64_t kFewReaders = 4;

// From here on a weight's power of two is kept apart: sums of smaller ones are far from the largest number, and 1 + x is 0 or 2^-24 at
// least, so none is too small.
constexpr float kLargeWeight = 0x1p32f;

// The dimension along which neighbours form operands.
enum class SumOver { kHeadDim, kKeys };

// Rows of operands of keys or values, one every `stride`: of each key, or, of sums over keys, of each pair of keys if T is one.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;
};

// The keys that take part of a range of kKeyTile neighbouring ones, in their order.
struct KeyTile {
  int64_t first, count = 0;
  int64_t place[kKeyTile];  // from `first`
  // The weight is factor * 2^power. The power of one too large for sums is left to the exponent, that of others is 0.
  float factor[kKeyTile], power[kKeyTile];

  // Keys of [first, first + keys) for which take(place, weight) holds.
  template <class Take>
  KeyTile(const float* weights, int64_t first_key, int64_t keys, Take take) : first(first_key) {
    bool all = true;  // which is common, and takes no decision per key
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

  // How many of the keys stand at `position` or before.
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

  // From one copied row to the next.
  template <SumOver kSum, class T>
  static int64_t row_stride(int64_t head_dim) {
    return round_up(kSum == SumOver::kKeys ? head_dim : operands<T>(head_dim));
  }

  // Their rows of keys or values as operands, copied to `out`.
  template <SumOver kSum, class T>
  KeyRows<T> pack(const Matrices& m, DType dtype, int64_t offset, int64_t head_dim, T* out) const {
    constexpr bool kPairsOfRows = kSum == SumOver::kKeys && kValues<T> == 2;
    const int64_t stride = row_stride<kSum, T>(head_dim);
    const auto row = [&](int64_t j) { return offset + (first + place[j]) * m.row; };
    for (int64_t j = 0; j < count; ++j) {
      prefetch_row(m, dtype, row(j) + kAhead * m.row, head_dim);
      if constexpr (!kPairsOfRows) load_row(m, dtype, row(j), head_dim, out + j * stride);
    }
    for (int64_t d = 0; kPairsOfRows && d < head_dim; d += kWidth) {
      const auto values = [&](int64_t j) { return load_values<DType::kBFloat16>(m.data, row(j) + d, head_dim - d); };
      store_over_rows(count, values, out + d, stride);
    }
    return {out, stride};
  }

  // The same, for so many blocks of queries: where the rows stand, if that can be and few read them there. A product goes through them
  // a few at a time, so all are called for before. `copied` says that `out` holds them already, if it is to.
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

// Keys [begin, end) of a tile that are computed together: by the query vectors from first_vec on, where all lanes but those of
// a ragged step's first vector see all of its keys. Under causal attention a block on the diagonal is a staircase.
struct Step {
  int64_t begin, end, first_vec;
  bool ragged;
};

struct Staircase {
  Step step[kMostVecs + 1];
  int count = 0;
  int64_t keys[kMostVecs];  // that any lane of a vector sees

  // `position` is that of the first query among the keys. The key there belongs to the first ragged step, though all lanes see it:
  // in a tile without gaps that step then has whole vectors of keys too, for which products have the most accumulators.
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

// Lanes of a ragged step's first vector that see a key.
inline IntVec seen(const KeyTile& tile, int64_t key, const Step& step, int64_t position) {
  const int64_t lane = tile.first + tile.place[key] - position - step.first_vec * kWidth;
  return lane_index() >= static_cast<int32_t>(lane);
}

// Some neighbouring query rows, in whole vectors.
struct Block {
  int64_t first, vecs;

  int64_t rows() const { return vecs * kWidth; }
};

// Query rows are cut into blocks of at most kMostVecs vectors each, as even as can be.
struct Blocks {
  int64_t vecs, count;

  explicit Blocks(int64_t num_rows) : vecs(round_up(num_rows) / kWidth), count((vecs + kMostVecs - 1) / kMostVecs) {}

  int64_t rows() const { return vecs * kWidth; }
  Block operator[](int64_t index) const {
    const int64_t begin = vecs * index / count, end = vecs * (index + 1) / count;
    return {begin * kWidth, end - begin};
  }
};

// Dropout factors of a tile: factor[k * stride + i] for every place k that a key of the tile up to `end` has.
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
