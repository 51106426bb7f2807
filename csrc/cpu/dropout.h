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

  // factor[0, 8 * blocks) of one query row, from key 8 * first_block on.
  void row(int64_t query, int64_t first_block, int64_t blocks, float* factor) const {
    constexpr int kLanes = 16;  // draws side by side, so that the compiler vectorises over them
    uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
    for (int64_t start = 0; start < blocks; start += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        c0[i] = batch_head;
        c1[i] = static_cast<uint32_t>(query);
        c2[i] = static_cast<uint32_t>(first_block + start + i);
        c3[i] = 0;
      }
      uint32_t k0 = key[0], k1 = key[1];
      for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kLanes; ++i) {
          const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i], p1 = uint64_t{0xCD9E8D57u} * c2[i];
          c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
          c1[i] = static_cast<uint32_t>(p1);
          c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
          c3[i] = static_cast<uint32_t>(p0);
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
      }
      for (int i = 0; i < kLanes && start + i < blocks; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        for (int w = 0; w < 4; ++w) {
          factor[(start + i) * 8 + 2 * w] = (words[w] & 0xffffu) < threshold ? 0.0f : kept_factor;
          factor[(start + i) * 8 + 2 * w + 1] = (words[w] >> 16) < threshold ? 0.0f : kept_factor;
        }
      }
    }
  }
};
