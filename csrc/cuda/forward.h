// The forward pass: online softmax over tiles of keys (FlashAttention). A thread block computes a
// block of query rows. The same code decodes (decode.h); then its rows are the few queries of several
// heads that share keys, and its tiles are one part of the keys.
#pragma once

#include "dropout.h"
#include "logsumexp.h"
#include "matmul.h"
#include "pipeline.h"
#include "tiling.h"

namespace empcause::cuda {

// How decoding is divided. If there are several parts of the keys, the results of each are stored in scratch memory,
// [part, batch, head, query].
struct Parts {
  int count = 1, heads = 1;  // parts; heads of one thread block, which share keys and weights
  float* output = nullptr;   // [..., head_dim], not yet divided by the total
  float* maximum = nullptr;  // the largest base-2 logit, -infinity for a part without keys
  float* total = nullptr;    // relative to 2^maximum

  // Returns the index of a row in these arrays.
  EMPCAUSE_DEVICE int64_t row(const Attention& a, int64_t part, int64_t batch, int64_t head, int64_t query) const {
    return ((part * a.batch + batch) * a.num_heads + head) * a.num_queries + query;
  }
};

struct ForwardArguments {
  Attention a;
  DropoutRate dropout;
  bool whole_chunks;
  Parts parts;
};

template <class T, int kHeadDim, bool kDropout, bool kDecode>
class ForwardBlock {
 public:
  using Shape =
      std::conditional_t<kDecode, typename TilingsOf<T, kHeadDim>::Decode, typename TilingsOf<T, kHeadDim>::Forward>;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;

  static EMPCAUSE_ANYWHERE int row_blocks(const ForwardArguments& f) {
    return kDecode ? f.parts.count : static_cast<int>((f.a.num_queries + kRows - 1) / kRows);
  }

  // `row_block` counts blocks of query rows, or, in decoding, parts; `batch_group` counts the groups of
  // heads of all batches.
  EMPCAUSE_DEVICE ForwardBlock(const ForwardArguments& arguments, int row_block, int batch_group)
      : f(arguments),
        a(f.a),
        heads(kDecode ? f.parts.heads : 1),
        part(kDecode ? row_block : 0),
        first_query(kDecode ? 0 : row_block * kRows),
        warp_row(uniform_warp() * Shape::kWarpRows) {
    const int groups = static_cast<int>(a.num_heads) / heads;
    batch = batch_group / groups;
    first_head = batch_group % groups * heads;
    const Sequence s = sequence(a, batch);
    query_begin = static_cast<int>(s.query_begin);
    key_begin = static_cast<int>(s.key_begin);
    num_keys = static_cast<int>(s.num_keys);
    const int64_t queries = clamped(s.num_queries, 0, a.num_queries) - first_query;
    rows = static_cast<int>(clamped(queries * heads, 0, kRows));

    // Without a causal mask this is beyond every key; with one it is clamped to a block before or after the keys.
    row0_last_key =
        a.causal ? static_cast<int>(clamped(first_query + s.offset, -kRows, s.num_keys + kColumns)) : kMostRows;
    const int seen = static_cast<int>(clamped(int64_t{last_key(rows - 1)} + 1, 0, s.num_keys));
    tiles = (seen + kColumns - 1) / kColumns;
    if (kDecode) {
      const int share = (tiles + f.parts.count - 1) / f.parts.count;
      first_tile = part * share;
      tiles = static_cast<int>(clamped(tiles - first_tile, 0, share));
    }

    output.clear();
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = -kInfinity;
        total[m][half] = 0.0f;
      }
    }
  }

  EMPCAUSE_DEVICE void run() {
    if (rows <= 0) return;
    copy_rows<kRows, kThreads>(
        head_dim(), f.whole_chunks, [&](int row) { return row < rows; },
        Copy<T, kHeadDim>{query_tile(), row_of<T>(a.query, batch, head(0), query_row(0)), a.query.row,
                          static_cast<uint32_t>(heads), a.query.head});
    pipeline(tiles, *this);
    finish();
  }

  EMPCAUSE_DEVICE float fetch(int tile) const {
    const int key = first_key(tile) + thread();
    if (tile >= tiles || thread() >= kColumns || key >= num_keys) return 0.0f;
    return weight_of(a, batch, first_head, key_begin + key);
  }

  EMPCAUSE_DEVICE bool publish(int tile, float weight) const {
    if (thread() >= kColumns) return false;
    const float log2_of_weight = log2(weight);
    store_shared(log2_weight(tile, thread()), log2_of_weight);
    return log2_of_weight == -kInfinity;
  }

  EMPCAUSE_DEVICE void copy(int tile, int absent) const {
    if (absent == kColumns) return;
    const int row = key_begin + first_key(tile);
    copy_rows<kColumns, kThreads>(
        head_dim(), f.whole_chunks,
        [&](int key) { return absent == 0 || load_shared<float>(log2_weight(tile, key)) > -kInfinity; },
        Copy<T, kHeadDim>{key_tile(tile), row_of<T>(a.key, batch, key_head(), row), a.key.row},
        Copy<T, kHeadDim>{value_tile(tile), row_of<T>(a.value, batch, key_head(), row), a.value.row});
  }

  EMPCAUSE_DEVICE void compute(int tile, int absent) {
    const int last_row = warp_row + Shape::kWarpRows < rows ? warp_row + Shape::kWarpRows - 1 : rows - 1;
    if (absent == kColumns || warp_row >= rows || first_key(tile) > last_key(last_row)) return;
    if (absent == 0 && first_key(tile) + kColumns - 1 <= last_key(warp_row)) {
      attend<false>(tile);
    } else {
      attend<true>(tile);
    }
  }

 private:
  using RowTile = Tile<T, kHeadDim>;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr uint32_t kQueryBytes = kRows * RowTile::kRowBytes, kKeyBytes = kColumns * RowTile::kRowBytes;
  static constexpr uint32_t kWeightBytes = kColumns * sizeof(float);
  static constexpr uint32_t kWeights = kQueryBytes + 2 * kTileStages * kKeyBytes;

 public:
  static constexpr uint32_t kSharedBytes = kWeights + kValueStages * kWeightBytes;

 private:
  EMPCAUSE_DEVICE RowTile query_tile() const { return {shared_memory()}; }
  EMPCAUSE_DEVICE RowTile key_tile(int tile) const {
    return {shared_memory() + (kQueryBytes + static_cast<uint32_t>(tile % kTileStages) * 2 * kKeyBytes)};
  }
  EMPCAUSE_DEVICE RowTile value_tile(int tile) const { return {key_tile(tile).start + kKeyBytes}; }
  EMPCAUSE_DEVICE Shared log2_weight(int tile, int key) const {
    return shared_memory() + (kWeights + static_cast<uint32_t>(tile % kValueStages) * kWeightBytes +
                              static_cast<uint32_t>(key) * static_cast<uint32_t>(sizeof(float)));
  }

  EMPCAUSE_DEVICE int head_dim() const { return static_cast<int>(a.head_dim); }
  EMPCAUSE_DEVICE int first_key(int tile) const { return (first_tile + tile) * kColumns; }
  EMPCAUSE_DEVICE int key_head() const { return first_head / static_cast<int>(a.num_heads / a.num_key_heads); }
  // Row r of the block is one query of one head; rows of the same query in several heads are neighbours.
  EMPCAUSE_DEVICE int head(int row) const { return first_head + row % heads; }
  EMPCAUSE_DEVICE int query(int row) const { return first_query + row / heads; }
  EMPCAUSE_DEVICE int query_row(int row) const { return query_begin + query(row); }
  EMPCAUSE_DEVICE int last_key(int row) const { return row0_last_key + row / heads; }

  // Adds one tile of keys to the sums: computes its logits, their exponentials and their product with the values.
  // Without kMasked, every row sees every key of the tile.
  template <bool kMasked>
  EMPCAUSE_DEVICE void attend(int tile) {
    Fragment<Shape::kRowTiles, kColumns / 8> p;
    multiply(p, query_tile(), warp_row, key_tile(tile));
    const float scale = a.scale * kLog2E;
    EMPCAUSE_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const TwoFloats log2_weights = load_shared<TwoFloats>(log2_weight(tile, n * 8 + lane_column()));
      EMPCAUSE_UNROLL
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float log2_weight = log2_weights.at[i % 2];
          p.at[m][n][i] = fma(p.at[m][n][i], scale, log2_weight);
          // The logit of an absent key is selected, not computed: in a dead row, the query may be NaN.
          if (kMasked && (log2_weight == -kInfinity ||
                          first_key(tile) + n * 8 + lane_column() + i % 2 > last_key(fragment_row(m, i / 2)))) {
            p.at[m][n][i] = -kInfinity;
          }
        }
      }
    }
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) softmax_row(p.at[m], m, half);
    }
    // Dropout comes after the total is summed, as it applies to normalised probabilities. store_output
    // multiplies by the factor of the kept ones.
    if constexpr (kDropout) {
      apply_dropout(p, Dropout(a, f.dropout, batch, first_head)
                           .template kept<Shape::kRowTiles, kColumns / 8>(first_query + warp_row, first_key(tile)));
    }
    accumulate(output, p, value_tile(tile), 0);
  }

  // Turns one row of logits into weighted, unnormalised probabilities, and corrects the sums of the row
  // if its maximum rises.
  EMPCAUSE_DEVICE void softmax_row(float (&p)[kColumns / 8][4], int m, int half) {
    float best = maximum[m][half];
    EMPCAUSE_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) best = fmaxf(best, fmaxf(p[n][2 * half], p[n][2 * half + 1]));
    best = quad_maximum(best);
    const float shift = best == -kInfinity ? 0.0f : best;
    const float correction = exp2(maximum[m][half] - shift);
    maximum[m][half] = best;
    float tile_total = 0.0f;
    EMPCAUSE_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      EMPCAUSE_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        p[n][i] = exp2(p[n][i] - shift);
        tile_total += p[n][i];
      }
    }
    total[m][half] = fma(total[m][half], correction, tile_total);
    EMPCAUSE_UNROLL
    for (int n = 0; n < kHeadDim / 8; ++n) {
      output.at[m][n][2 * half] *= correction;
      output.at[m][n][2 * half + 1] *= correction;
    }
  }

  static EMPCAUSE_DEVICE void apply_dropout(Fragment<Shape::kRowTiles, kColumns / 8>& p,
                                            const Kept<Shape::kRowTiles>& kept) {
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) p.at[m][n][i] = kept.at(m, n, i) ? p.at[m][n][i] : 0.0f;
      }
    }
  }

  EMPCAUSE_DEVICE void finish() {
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) total[m][half] = quad_sum(total[m][half]);
    }
    if (kDecode && f.parts.count > 1) {
      store_part();
    } else {
      store_output();
    }
  }

  EMPCAUSE_DEVICE void store_output() {
    const float kept_factor = kDropout ? f.dropout.kept_factor : 1.0f;
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(m, half);
        if (row < rows && lane_column() == 0) {
          LogSumExp<T>::of(maximum[m][half], total[m][half]).store(a, batch, head(row), query_row(row));
        }
      }
    }
    store_rows<T>(
        output, 0, head_dim(), f.whole_chunks,
        [&](int m, int half) { return total[m][half] == 0.0f ? 0.0f : kept_factor / total[m][half]; },
        [&](int m, int half) -> T* {
          const int row = fragment_row(m, half);
          return row < rows ? row_of<T>(a.output, batch, head(row), query_row(row)) : nullptr;
        });
  }

  EMPCAUSE_DEVICE void store_part() {
    const auto place = [&](int row) { return f.parts.row(a, part, batch, head(row), query(row)); };
    EMPCAUSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = fragment_row(0, half);
      if (row < rows && lane_column() == 0) {
        store_global(f.parts.maximum + place(row), maximum[0][half]);
        store_global(f.parts.total + place(row), total[0][half]);
      }
    }
    store_rows<float>(
        output, 0, head_dim(), a.head_dim % 4 == 0, [](int, int) { return 1.0f; },
        [&](int, int half) -> float* {
          const int row = fragment_row(0, half);
          return row < rows ? f.parts.output + place(row) * a.head_dim : nullptr;
        });
  }

  EMPCAUSE_DEVICE int fragment_row(int m, int half) const { return warp_row + m * 16 + half * 8 + lane_row(); }

  const ForwardArguments& f;
  const Attention& a;
  const int heads, part, first_query, warp_row;
  int batch, first_head, query_begin, key_begin, num_keys, rows;
  int row0_last_key;  // the last key that row 0 of the block sees
  int first_tile = 0, tiles;

  // Sums over the keys so far for the warp's rows, relative to 2^maximum, and the largest logit so far
  // (base 2, including the weight).
  Fragment<Shape::kRowTiles, kHeadDim / 8> output;
  float maximum[Shape::kRowTiles][2], total[Shape::kRowTiles][2];
};

template <class T, int kHeadDim, bool kDropout>
struct ForwardKernel {
  using Block = ForwardBlock<T, kHeadDim, kDropout, false>;
  using Arguments = ForwardArguments;
  static constexpr int kThreads = Block::Shape::kThreads, kMinBlocks = Block::Shape::kMinBlocks;
  static constexpr uint32_t kSharedBytes = Block::kSharedBytes;

  static int64_t num_blocks(const ForwardArguments& f) { return f.a.batch * f.a.num_heads * Block::row_blocks(f); }

  static EMPCAUSE_DEVICE void run(const ForwardArguments& f) {
    const int row_blocks = Block::row_blocks(f), block = static_cast<int>(block_index().x);
    const int row_block = block % row_blocks;
    // Under a causal mask the last rows have the most keys, so their blocks start first.
    Block(f, f.a.causal ? row_blocks - 1 - row_block : row_block, block / row_blocks).run();
  }
};

}  // namespace empcause::cuda
