// Dropout factors from Philox4x32-10 (Salmon et al., 2011): key = seed, counter = (batch * heads + head, query row,
// key / 8, 0). The eight 16-bit lanes of a draw serve eight neighbouring keys, low half of each word first; a
// probability is dropped where its lane is below round(p * 65536).
// Include inside the namespace of an instruction set only.

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

  // factor[k * stride + i] for keys 8 * block + k, k < 8, and query rows query + i, i < lanes (whole vectors).
  void block(int64_t query, int64_t lanes, int64_t key_block, int64_t stride, float* factor) const {
    for (int64_t first = 0; first < lanes; first += kWidth) {
      uint32_t c0[kWidth], c1[kWidth], c2[kWidth], c3[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        c0[i] = batch_head;
        c1[i] = static_cast<uint32_t>(query + first + i);
        c2[i] = static_cast<uint32_t>(key_block);
        c3[i] = 0;
      }
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kWidth; ++i) {
          const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
          c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
          c1[i] = static_cast<uint32_t>(p1);
          c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
          c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      const uint32_t* words[4] = {c0, c1, c2, c3};
      for (int w = 0; w < 4; ++w) {
        float* low = factor + 2 * w * stride + first;
        float* high = low + stride;
        for (int i = 0; i < kWidth; ++i) {
          low[i] = (words[w][i] & 0xffffu) < threshold ? 0.0f : kept_factor;
          high[i] = (words[w][i] >> 16) < threshold ? 0.0f : kept_factor;
        }
      }
    }
  }
};
