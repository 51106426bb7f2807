// Which probabilities dropout keeps, from the counter-based generator Philox4x32-10 (Salmon et al.,
// 2011): its key is the seed, its counter is (batch * heads + head, query row, key / 8, 0). The eight
// 16-bit halves of the four words drawn belong to eight neighbouring keys, the low half of each word
// first. A probability is dropped where its 16 bits are below round(p * 65536).
//
// A draw covers one row of a tile of queries by keys, or one column of a tile of keys by queries. The lanes that share
// draws compute one each and exchange the words.
#pragma once

#include "../attention.h"
#include "fragment.h"

namespace empcause::cuda {

// The dropout probability, as the kernels use it; the host computes it.
struct DropoutRate {
  uint32_t threshold;
  float kept_factor;

  explicit DropoutRate(double p)
      : threshold(static_cast<uint32_t>(p * 65536.0 + 0.5)), kept_factor(static_cast<float>(1.0 / (1.0 - p))) {}
};

// One bit for every element of a fragment that the lane holds: whether dropout keeps it.
template <int kRowTiles>
struct Kept {
  uint32_t bits[kRowTiles] = {};  // four bits for each of at most eight column tiles

  EMPCAUSE_DEVICE bool at(int m, int n, int i) const { return (bits[m] >> (n * 4 + i) & 1) != 0; }
};

class Dropout {
 public:
  EMPCAUSE_DEVICE Dropout(const Attention& a, DropoutRate rate, int batch, int head)
      : threshold(rate.threshold), batch_head(static_cast<uint32_t>(batch * a.num_heads + head)) {
    const uint64_t value = a.seed == nullptr ? 0 : static_cast<uint64_t>(load_global(a.seed));
    seed[0] = static_cast<uint32_t>(value);
    seed[1] = static_cast<uint32_t>(value >> 32);
  }

  // Returns which elements are kept of a fragment whose rows are queries, from `query` on, and whose
  // columns are keys, from `key` on.
  template <int kRowTiles, int kColumnTiles>
  EMPCAUSE_DEVICE Kept<kRowTiles> kept(int query, int key) const {
    return collect<kRowTiles, kColumnTiles>([&](int m, int n) { return kept_two_tiles(query + m * 16, key + n * 8); });
  }

  // Returns which elements are kept of a fragment whose rows are keys and whose columns are queries.
  template <int kRowTiles, int kColumnTiles>
  EMPCAUSE_DEVICE Kept<kRowTiles> kept_transposed(int key, int query) const {
    return collect<kRowTiles, kColumnTiles>(
        [&](int m, int n) { return kept_two_tiles_transposed(key + m * 16, query + n * 8); });
  }

 private:
  // Collects the bits of a fragment; kept_tiles(m, n) returns those of the column tiles n and n + 1 of row tile m.
  template <int kRowTiles, int kColumnTiles, class KeptTiles>
  static EMPCAUSE_DEVICE Kept<kRowTiles> collect(KeptTiles kept_tiles) {
    static_assert(kColumnTiles <= 8);
    Kept<kRowTiles> kept;
    EMPCAUSE_UNROLL_BY(1)  // interleaved draws would take all registers
    for (int n = 0; n < kColumnTiles; n += 2) {
      EMPCAUSE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) kept.bits[m] |= kept_tiles(m, n) << n * 4;
    }
    return kept;
  }

  EMPCAUSE_DEVICE void draw(int query, int key_block, uint32_t (&words)[4]) const {
    uint32_t c0 = batch_head, c1 = static_cast<uint32_t>(query), c2 = static_cast<uint32_t>(key_block), c3 = 0;
    uint32_t k0 = seed[0], k1 = seed[1];
    EMPCAUSE_UNROLL_BY(2)  // unrolled by more, the compiler keeps the keys of every round in registers
    for (int round = 0; round < 10; ++round) {
      const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
      const uint32_t high1 = multiply_high(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
  }

  // Returns the bits of two neighbouring column tiles: bit 4 tile + i belongs to the lane's element i of
  // the tile. The quad shares four draws, for two rows of two tiles.
  EMPCAUSE_DEVICE uint32_t kept_two_tiles(int query, int key) const {
    const int mine = lane() % 4;
    uint32_t words[4];
    draw(query + lane_row() + mine % 2 * 8, key / 8 + mine / 2, words);
    transpose(words, 1);
    uint32_t bits = 0;
    EMPCAUSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      bits |= static_cast<uint32_t>((words[i] & 0xffffu) >= threshold) << 2 * i;
      bits |= static_cast<uint32_t>(words[i] >> 16 >= threshold) << (2 * i + 1);
    }
    return bits;
  }

  // Returns the bits of two neighbouring column tiles of a transposed fragment. The eight lanes of a column share eight
  // draws, one for every element that each of them holds.
  EMPCAUSE_DEVICE uint32_t kept_two_tiles_transposed(int key, int query) const {
    const int mine = lane_row();
    uint32_t words[4];
    draw(query + mine / 4 * 8 + lane_column() + mine % 2, key / 8 + mine / 2 % 2, words);
    // The lane of row g needs half g % 2 of word g / 2 of all eight draws. After this, it has that word of
    // every second draw; the lane of row g ^ 1 has that of the others.
    transpose(words, 8);
    const bool odd = mine % 2 != 0;
    const int shift = odd ? 16 : 0;
    uint32_t bits = 0;
    EMPCAUSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint32_t other = shuffle_xor(words[i], 4);
      const uint32_t even_draw = odd ? other : words[i], odd_draw = odd ? words[i] : other;
      bits |= static_cast<uint32_t>((even_draw >> shift & 0xffffu) >= threshold) << 2 * i;
      bits |= static_cast<uint32_t>((odd_draw >> shift & 0xffffu) >= threshold) << (2 * i + 1);
    }
    return bits;
  }

  uint32_t threshold;
  uint32_t seed[2];
  uint32_t batch_head;
};

}  // namespace empcause::cuda
