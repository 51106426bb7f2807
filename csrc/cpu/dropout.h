// Dropout factors from the counter-based generator Philox4x32-10 (Salmon et al., 2011): its key is the
// seed, its counter is (batch * heads + head, query row, key / 8, 0). The eight 16-bit halves of the
// four words drawn belong to eight neighbouring keys, the low half of each word first. A probability
// is dropped where its 16 bits are below round(p * 65536).
#pragma once

#include "../attention.h"
#include "simd.h"

namespace empcause::cpu::EMPCAUSE_ISA {

struct Dropout {
  uint32_t threshold;
  float kept_factor;
  uint32_t key[2];
  uint32_t batch_head;

  Dropout(const Attention& a, int64_t batch, int64_t head)
      : threshold(static_cast<uint32_t>(__builtin_floor(a.dropout_p * 65536.0 + 0.5))),
        kept_factor(static_cast<float>(1.0 / (1.0 - a.dropout_p))),
        key{seed_word(a, 0), seed_word(a, 32)},
        batch_head(static_cast<uint32_t>(batch * a.num_heads + head)) {}

  static uint32_t seed_word(const Attention& a, int shift) {
    return a.seed == nullptr ? 0 : static_cast<uint32_t>(static_cast<uint64_t>(*a.seed) >> shift);
  }

  bool active() const { return threshold != 0; }

  // Sets factor[k * stride + i] for key 8 * key_block + k, k < 8, and query row query + i, i < lanes.
  // `lanes` is a multiple of kWidth.
  void block(int64_t query, int64_t lanes, int64_t key_block, int64_t stride, float* factor) const {
    for (int64_t first = 0; first < lanes; first += kWidth) {
      // Even and odd rows are drawn apart, each 32-bit number in the low half of a 64-bit lane. The high
      // half, where a product leaves bits, is ignored by the next product.
      const LongVec row = LongVec{} + static_cast<uint64_t>(query + first);
      LongVec even[4], odd[4];
      for (int i = 0; i < kWidth / 2; ++i) even[1][i] = static_cast<uint64_t>(2 * i);
      even[1] += row;
      odd[1] = even[1] + 1;
      even[0] = odd[0] = LongVec{} + batch_head;
      even[2] = odd[2] = LongVec{} + static_cast<uint32_t>(key_block);
      even[3] = odd[3] = LongVec{};
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        philox_round(even, k0, k1);
        philox_round(odd, k0, k1);
      }
      const IntVec limit = IntVec{} + static_cast<int32_t>(threshold);
      const Vec kept = splat(kept_factor);
      for (int w = 0; w < 4; ++w) {
        const IntVec word = reinterpret_cast<IntVec>((even[w] & 0xffffffffu) | (odd[w] << 32));
        const IntVec high = reinterpret_cast<IntVec>(reinterpret_cast<UnsignedVec>(word) >> 16);
        store(factor + 2 * w * stride + first, (word & 0xffff) < limit ? Vec{} : kept);
        store(factor + (2 * w + 1) * stride + first, high < limit ? Vec{} : kept);
      }
    }
  }

  static void philox_round(LongVec (&c)[4], uint32_t k0, uint32_t k1) {
    const LongVec p0 = multiply_low_halves(c[0], LongVec{} + 0xD2511F53u);
    const LongVec p1 = multiply_low_halves(c[2], LongVec{} + 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ k0;
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ k1;
    c[3] = p0;
  }
};

}  // namespace empcause::cpu::EMPCAUSE_ISA
