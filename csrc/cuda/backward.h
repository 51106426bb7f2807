// The backward pass. Two kernels recompute probabilities from the statistics that the forward pass stored for
// each row, and sum gradients in a fixed order. A block of BackwardKeys computes the gradients of rows of keys,
// for all heads that share them, and goes over the queries; a block of BackwardQueries computes those of rows of
// queries and goes over the keys. Both need delta_i = grad_output_i . output_i: BackwardQueries, which runs first,
// computes it.
//
//   e_ij = exp(x_ij - LSE_i)     b_ij = w_j e_ij     dS_ij = b_ij (Z_ij grad_output_i . value_j - delta_i)
//
// As in the forward pass, log2 of the weight is added to the exponent. For a key of weight 0, whose b
// is 0, nothing is added: then the exponential is the e that the gradient of the weight needs.
#pragma once

#include <cstring>

#include "dropout.h"
#include "logsumexp.h"
#include "matmul.h"
#include "pipeline.h"
#include "tiling.h"

namespace empcause::cuda {

struct BackwardArguments {
  AttentionBackward g;
  DropoutRate dropout;
  bool whole_chunks;
  Rows delta;  // [batch, head, row]
};

// Returns the exponential of a logit relative to LSE: b, or e if log2_weight is kNoWeight. Only e may overflow, so
// that kCapped limits it (kLargestExponent).
template <bool kCapped, class T>
EMPCAUSE_DEVICE float exponential(float product, float scale, float log2_weight, LogSumExp<T> lse) {
  const float exponent = lse.taken_from(fma(product, scale, log2_weight));
  return exp2(kCapped && exponent > kLargestExponent ? kLargestExponent : exponent);  // NaN stays NaN
}

// What stands for log2 of weight 0. It adds nothing to an exponent, and its sign tells it from log2 of
// weight 1; a flag would take a register.
constexpr float kNoWeight = -0.0f;

EMPCAUSE_DEVICE bool has_weight(float log2_weight) {
  uint32_t bits;
  memcpy(&bits, &log2_weight, sizeof bits);
  return bits != 0x80000000u;
}

// The values of a query that BackwardKeys needs beside its rows.
template <class T>
struct alignas(4 * sizeof(T)) QueryValues {
  LogSumExp<T> lse;
  float delta;
};

// Computes grad_key, grad_value and grad_weight of a block of rows of keys. Its tiles are queries: b and
// dS are transposed, so that their fragments are the left operands of the products that sum over queries.
template <class T, int kHeadDim, bool kDropout>
class BackwardKeysBlock {
 public:
  using Shape = typename TilingsOf<T, kHeadDim>::BackwardKeys;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kSlices = TilingsOf<T, kHeadDim>::kSlices;

  static EMPCAUSE_ANYWHERE int row_blocks(const Attention& a) {
    return static_cast<int>((a.num_keys + kRows - 1) / kRows);
  }

  EMPCAUSE_DEVICE BackwardKeysBlock(const BackwardArguments& arguments, int row_block, int slice_index,
                                    int batch_key_head)
      : f(arguments),
        a(f.g.forward),
        slice(slice_index),
        group(static_cast<int>(a.num_heads / a.num_key_heads)),
        batch(batch_key_head / static_cast<int>(a.num_key_heads)),
        key_head(batch_key_head % static_cast<int>(a.num_key_heads)),
        first_key(row_block * kRows),
        warp_row(uniform_warp() * Shape::kWarpRows) {
    const Sequence s = sequence(a, batch);
    query_begin = static_cast<int>(s.query_begin);
    key_begin = static_cast<int>(s.key_begin);
    num_queries = static_cast<int>(clamped(s.num_queries, 0, a.num_queries));
    rows = static_cast<int>(clamped(s.num_keys - first_key, 0, kRows));
    // Row r is seen by the queries from row0_first_query + r on.
    row0_first_query = a.causal ? static_cast<int>(clamped(first_key - s.offset, -kRows, num_queries)) : -kRows;
    first_tile = row0_first_query < 0 ? 0 : row0_first_query / kColumns;
    tiles = (num_queries + kColumns - 1) / kColumns - first_tile;

    grad_key.clear();
    grad_value.clear();
  }

  EMPCAUSE_DEVICE void run() {
    if (rows <= 0) return;
    const int row = key_begin + first_key;
    copy_rows<kRows, kThreads>(
        head_dim(), f.whole_chunks, [&](int key) { return key < rows; },
        Copy<T, kHeadDim>{key_tile(), row_of<T>(a.key, batch, key_head, row), a.key.row},
        Copy<T, kHeadDim>{value_tile(), row_of<T>(a.value, batch, key_head, row), a.value.row});
    for (int member = 0; member < group; ++member) {
      begin_head(key_head * group + member);
      pipeline(tiles, *this);
      if (slice == 0 && f.g.grad_weight.data != nullptr) store_grad_weight();
      sync_block();  // before tiles of the next head overwrite those of this one
    }
    finish();
  }

  EMPCAUSE_DEVICE QueryValues<T> fetch(int tile) const {
    const int query = first_query(tile) + thread();
    if (tile >= tiles || thread() >= kColumns || query >= num_queries) return {LogSumExp<T>::none(), 0.0f};
    const int row = query_begin + query;
    return {LogSumExp<T>::load(a, batch, head, row), load_global(row_of(f.delta, batch, head, row))};
  }

  EMPCAUSE_DEVICE bool publish(int tile, QueryValues<T> value) const {
    if (thread() >= kColumns) return false;
    store_shared(query_values(tile, thread()), value);
    return !value.lse.sees_a_key();
  }

  EMPCAUSE_DEVICE void copy(int tile, int) const {
    const int row = query_begin + first_query(tile);
    const Matrices& grad_output = f.g.grad_output;
    copy_rows<kColumns, kThreads>(
        head_dim(), f.whole_chunks,
        [&](int query) { return load_shared<float>(query_values(tile, query)) != kInfinity; },
        Copy<T, kHeadDim>{query_tile(tile), row_of<T>(a.query, batch, head, row), a.query.row},
        Copy<T, kHeadDim>{grad_output_tile(tile), row_of<T>(grad_output, batch, head, row), grad_output.row});
  }

  // Absent queries are zeros, as is all that they add.
  EMPCAUSE_DEVICE void compute(int tile, int) {
    if (warp_row >= rows) return;
    const int last_query = first_query(tile) + kColumns - 1;
    bool some_have_weight = false, some_lack_weight = false;
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        some_have_weight |= has_weight(log2_weight[m][half]);
        some_lack_weight |= !has_weight(log2_weight[m][half]);
      }
    }
    if (f.g.grad_weight.data == nullptr && !any_lane(some_have_weight)) return;
    if (!any_lane(some_lack_weight) && first_query(tile) >= row0_first_query + warp_row + Shape::kWarpRows - 1) {
      attend_backward<false>(tile);
    } else if (last_query >= row0_first_query + warp_row) {
      attend_backward<true>(tile);
    }
  }

 private:
  using RowTile = Tile<T, kHeadDim>;
  static constexpr int kThreads = Shape::kThreads, kSliceColumns = kHeadDim / kSlices;
  static constexpr uint32_t kKeyBytes = kRows * RowTile::kRowBytes, kQueryBytes = kColumns * RowTile::kRowBytes;
  static constexpr uint32_t kValueBytes = kColumns * sizeof(QueryValues<T>);
  static constexpr uint32_t kValues = 2 * kKeyBytes + 2 * kTileStages * kQueryBytes;

 public:
  static constexpr uint32_t kSharedBytes = kValues + kValueStages * kValueBytes;

 private:
  EMPCAUSE_DEVICE RowTile key_tile() const { return {shared_memory()}; }
  EMPCAUSE_DEVICE RowTile value_tile() const { return {shared_memory() + kKeyBytes}; }
  EMPCAUSE_DEVICE RowTile query_tile(int tile) const {
    return {shared_memory() + (2 * kKeyBytes + static_cast<uint32_t>(tile % kTileStages) * 2 * kQueryBytes)};
  }
  EMPCAUSE_DEVICE RowTile grad_output_tile(int tile) const { return {query_tile(tile).start + kQueryBytes}; }
  EMPCAUSE_DEVICE Shared query_values(int tile, int query) const {
    return shared_memory() + (kValues + static_cast<uint32_t>(tile % kValueStages) * kValueBytes +
                              static_cast<uint32_t>(query) * static_cast<uint32_t>(sizeof(QueryValues<T>)));
  }

  EMPCAUSE_DEVICE int head_dim() const { return static_cast<int>(a.head_dim); }
  EMPCAUSE_DEVICE int first_query(int tile) const { return (first_tile + tile) * kColumns; }
  EMPCAUSE_DEVICE int fragment_row(int m, int half) const { return warp_row + m * 16 + half * 8 + lane_row(); }

  EMPCAUSE_DEVICE float row_weight(int any_head, int row) const {
    return row < rows ? weight_of(a, batch, any_head, key_begin + first_key + row) : 0.0f;
  }

  EMPCAUSE_DEVICE void begin_head(int next_head) {
    head = next_head;
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float weight = row_weight(head, fragment_row(m, half));
        log2_weight[m][half] = weight > 0.0f ? log2(weight) : kNoWeight;
        grad_weight[m][half] = 0.0f;
      }
    }
  }

  EMPCAUSE_DEVICE bool wants_grad_weight(int row) const {
    return f.g.key_mask == nullptr ||
           load_global(f.g.key_mask + batch * f.g.key_mask_batch + key_begin + first_key + row);
  }

  EMPCAUSE_DEVICE void store_grad_weight() const {
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(grad_weight[m][half]);
        const int row = fragment_row(m, half);
        if (row >= rows || lane_column() != 0) continue;
        const int key = key_begin + first_key + row;
        const float weight = row_weight(head, row);
        store_global(row_of(f.g.grad_weight, batch, head, key), !wants_grad_weight(row) ? 0.0f
                                                                : weight > 0.0f         ? total / weight
                                                                                        : total);
      }
    }
  }

  template <bool kMasked>
  EMPCAUSE_DEVICE void attend_backward(int tile) {
    Fragment<Shape::kRowTiles, kColumns / 8> p, grad_logit;
    multiply(p, key_tile(), warp_row, query_tile(tile));
    multiply(grad_logit, value_tile(), warp_row, grad_output_tile(tile));
    Kept<Shape::kRowTiles> kept;
    if constexpr (kDropout) {
      kept = Dropout(a, f.dropout, batch, head)
                 .template kept_transposed<Shape::kRowTiles, kColumns / 8>(first_key + warp_row, first_query(tile));
    }
    const float scale = a.scale * kLog2E;
    EMPCAUSE_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      EMPCAUSE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane_column() + i % 2, half = i / 2;
        const QueryValues<T> values = load_shared<QueryValues<T>>(query_values(tile, column));
        EMPCAUSE_UNROLL
        for (int m = 0; m < Shape::kRowTiles; ++m) {
          float e = exponential<kMasked>(p.at[m][n][i], scale, log2_weight[m][half], values.lse);
          float gradient = grad_logit.at[m][n][i];
          if constexpr (kDropout) gradient = kept.at(m, n, i) ? gradient * f.dropout.kept_factor : 0.0f;
          float centred = gradient - values.delta;
          if (kMasked && first_query(tile) + column < row0_first_query + fragment_row(m, half)) e = centred = 0.0f;
          grad_weight[m][half] = fma(e, centred, grad_weight[m][half]);
          const float b = !kMasked || has_weight(log2_weight[m][half]) ? e : 0.0f;
          p.at[m][n][i] = !kDropout || kept.at(m, n, i) ? b : 0.0f;
          grad_logit.at[m][n][i] = b * centred;
        }
      }
    }
    accumulate(grad_value, p, grad_output_tile(tile), slice * kSliceColumns);
    accumulate(grad_key, grad_logit, query_tile(tile), slice * kSliceColumns);
  }

  // Stores the gradients. Those of an absent key, which may be NaN as its row is read like others, are set to 0.
  EMPCAUSE_DEVICE void finish() {
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        bool present = false;
        for (int member = 0; member < group; ++member) {
          present |= row_weight(key_head * group + member, fragment_row(m, half)) > 0.0f;
        }
        EMPCAUSE_UNROLL
        for (int n = 0; n < kSliceColumns / 8; ++n) {
          EMPCAUSE_UNROLL
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            grad_key.at[m][n][i] = present ? grad_key.at[m][n][i] : 0.0f;
            grad_value.at[m][n][i] = present ? grad_value.at[m][n][i] : 0.0f;
          }
        }
      }
    }
    store(f.g.grad_key, grad_key, a.scale);
    store(f.g.grad_value, grad_value, kDropout ? f.dropout.kept_factor : 1.0f);
  }

  EMPCAUSE_DEVICE void store(const Matrices& to, const Fragment<Shape::kRowTiles, kSliceColumns / 8>& gradient,
                             float factor) const {
    store_rows<T>(
        gradient, slice * kSliceColumns, head_dim(), f.whole_chunks, [&](int, int) { return factor; },
        [&](int m, int half) -> T* {
          const int row = fragment_row(m, half);
          return row < rows ? row_of<T>(to, batch, key_head, key_begin + first_key + row) : nullptr;
        });
  }

  const BackwardArguments& f;
  const Attention& a;
  const int slice, group, batch, key_head, first_key, warp_row;
  int query_begin, key_begin, num_queries, rows;
  int row0_first_query;   // the first query that sees row 0 of the block
  int first_tile, tiles;  // the same for every head
  int head;               // the head that the pipeline goes over now

  Fragment<Shape::kRowTiles, kSliceColumns / 8> grad_key, grad_value;
  // For the rows of `head`: log2 of the weight, or kNoWeight, and the gradient of the weight, times the
  // weight if that is positive.
  float log2_weight[Shape::kRowTiles][2], grad_weight[Shape::kRowTiles][2];
};

template <class T, int kHeadDim, bool kDropout>
struct BackwardKeysKernel {
  using Block = BackwardKeysBlock<T, kHeadDim, kDropout>;
  using Arguments = BackwardArguments;
  static constexpr int kThreads = Block::Shape::kThreads, kMinBlocks = Block::Shape::kMinBlocks;
  static constexpr uint32_t kSharedBytes = Block::kSharedBytes;

  static int64_t num_blocks(const Attention& a) {
    return a.batch * a.num_key_heads * Block::kSlices * Block::row_blocks(a);
  }

  static EMPCAUSE_DEVICE void run(const BackwardArguments& f) {
    const int row_blocks = Block::row_blocks(f.g.forward), block = static_cast<int>(block_index().x);
    const int index = block / row_blocks;
    Block(f, block % row_blocks, index % Block::kSlices, index / Block::kSlices).run();
  }
};

// Computes grad_query of a block of query rows of one head. Its tiles are keys.
template <class T, int kHeadDim, bool kDropout>
class BackwardQueriesBlock {
 public:
  using Shape = typename TilingsOf<T, kHeadDim>::BackwardQueries;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;

  static EMPCAUSE_ANYWHERE int row_blocks(const Attention& a) {
    return static_cast<int>((a.num_queries + kRows - 1) / kRows);
  }

  EMPCAUSE_DEVICE BackwardQueriesBlock(const BackwardArguments& arguments, int row_block, int batch_head)
      : f(arguments),
        a(f.g.forward),
        batch(batch_head / static_cast<int>(a.num_heads)),
        head(batch_head % static_cast<int>(a.num_heads)),
        first_query(row_block * kRows),
        warp_row(uniform_warp() * Shape::kWarpRows) {
    const Sequence s = sequence(a, batch);
    query_begin = static_cast<int>(s.query_begin);
    key_begin = static_cast<int>(s.key_begin);
    rows = static_cast<int>(clamped(clamped(s.num_queries, 0, a.num_queries) - first_query, 0, kRows));
    num_keys = static_cast<int>(s.num_keys);
    // Row r sees the keys up to row0_last_key + r.
    row0_last_key =
        a.causal ? static_cast<int>(clamped(first_query + s.offset, -kRows, s.num_keys + kColumns)) : kMostRows;
    const int seen = static_cast<int>(clamped(int64_t{row0_last_key} + rows, 0, s.num_keys));
    tiles = (seen + kColumns - 1) / kColumns;

    grad_query.clear();
    EMPCAUSE_UNROLL
    for (int m = 0; m < Shape::kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = fragment_row(m, half);
        const int query = query_begin + first_query + row;
        lse[m][half] = row < rows ? LogSumExp<T>::load(a, batch, head, query) : LogSumExp<T>::none();
        delta[m][half] = compute_delta(row, lse[m][half].sees_a_key());
      }
    }
  }

  EMPCAUSE_DEVICE void run() {
    if (rows <= 0) return;
    const int row = query_begin + first_query;
    const Matrices& grad_output = f.g.grad_output;
    copy_rows<kRows, kThreads>(
        head_dim(), f.whole_chunks,
        [&](int query) { return query < rows && LogSumExp<T>::load(a, batch, head, row + query).sees_a_key(); },
        Copy<T, kHeadDim>{query_tile(), row_of<T>(a.query, batch, head, row), a.query.row},
        Copy<T, kHeadDim>{grad_output_tile(), row_of<T>(grad_output, batch, head, row), grad_output.row});
    pipeline(tiles, *this);
    store_rows<T>(
        grad_query, 0, head_dim(), f.whole_chunks, [&](int, int) { return a.scale; },
        [&](int m, int half) -> T* {
          const int index = fragment_row(m, half);
          return index < rows ? row_of<T>(f.g.grad_query, batch, head, row + index) : nullptr;
        });
  }

  EMPCAUSE_DEVICE float fetch(int tile) const {
    const int key = tile * kColumns + thread();
    if (tile >= tiles || thread() >= kColumns || key >= num_keys) return 0.0f;
    return weight_of(a, batch, head, key_begin + key);
  }

  EMPCAUSE_DEVICE bool publish(int tile, float weight) const {
    if (thread() >= kColumns) return false;
    const float log2_of_weight = log2(weight);
    store_shared(log2_weight(tile, thread()), log2_of_weight);
    return log2_of_weight == -kInfinity;
  }

  EMPCAUSE_DEVICE void copy(int tile, int absent) const {
    if (absent == kColumns) return;
    const int row = key_begin + tile * kColumns, key_head = head / static_cast<int>(a.num_heads / a.num_key_heads);
    copy_rows<kColumns, kThreads>(
        head_dim(), f.whole_chunks,
        [&](int key) { return absent == 0 || load_shared<float>(log2_weight(tile, key)) > -kInfinity; },
        Copy<T, kHeadDim>{key_tile(tile), row_of<T>(a.key, batch, key_head, row), a.key.row},
        Copy<T, kHeadDim>{value_tile(tile), row_of<T>(a.value, batch, key_head, row), a.value.row});
  }

  // The rows of absent keys are zeros, as are their exponentials.
  EMPCAUSE_DEVICE void compute(int tile, int absent) {
    const int first_key = tile * kColumns;
    if (absent == kColumns || warp_row >= rows || first_key > row0_last_key + warp_row + Shape::kWarpRows - 1) return;
    if (first_key + kColumns - 1 <= row0_last_key + warp_row) {
      attend_backward<false>(tile);
    } else {
      attend_backward<true>(tile);
    }
  }

 private:
  using RowTile = Tile<T, kHeadDim>;
  static constexpr int kThreads = Shape::kThreads;
  static constexpr uint32_t kQueryBytes = kRows * RowTile::kRowBytes, kKeyBytes = kColumns * RowTile::kRowBytes;
  static constexpr uint32_t kWeightBytes = kColumns * sizeof(float);
  static constexpr uint32_t kWeights = 2 * kQueryBytes + 2 * kTileStages * kKeyBytes;

 public:
  static constexpr uint32_t kSharedBytes = kWeights + kValueStages * kWeightBytes;

 private:
  EMPCAUSE_DEVICE RowTile query_tile() const { return {shared_memory()}; }
  EMPCAUSE_DEVICE RowTile grad_output_tile() const { return {shared_memory() + kQueryBytes}; }
  EMPCAUSE_DEVICE RowTile key_tile(int tile) const {
    return {shared_memory() + (2 * kQueryBytes + static_cast<uint32_t>(tile % kTileStages) * 2 * kKeyBytes)};
  }
  EMPCAUSE_DEVICE RowTile value_tile(int tile) const { return {key_tile(tile).start + kKeyBytes}; }
  EMPCAUSE_DEVICE Shared log2_weight(int tile, int key) const {
    return shared_memory() + (kWeights + static_cast<uint32_t>(tile % kValueStages) * kWeightBytes +
                              static_cast<uint32_t>(key) * static_cast<uint32_t>(sizeof(float)));
  }

  EMPCAUSE_DEVICE int head_dim() const { return static_cast<int>(a.head_dim); }
  EMPCAUSE_DEVICE int fragment_row(int m, int half) const { return warp_row + m * 16 + half * 8 + lane_row(); }

  // Returns the values of a row from a column on, zeros beyond head_dim.
  EMPCAUSE_DEVICE Chunk<T> load_chunk(const T* row, int column) const {
    if (f.whole_chunks) return load_global(reinterpret_cast<const Chunk<T>*>(row + column));
    Chunk<T> chunk;
    EMPCAUSE_UNROLL
    for (int i = 0; i < Chunk<T>::kSize; ++i) {
      chunk.at[i] = column + i < head_dim() ? load_global(row + column + i) : T{};
    }
    return chunk;
  }

  // Returns delta of a row, which the quad computes together, and stores it for BackwardKeys. It is 0 for a row that
  // sees no key, whatever its gradient is.
  EMPCAUSE_DEVICE float compute_delta(int row, bool sees_a_key) const {
    constexpr int kSize = Chunk<T>::kSize;
    float sums[kSize] = {};  // one per column of a chunk: many short sums round less than few long ones
    if (row < rows) {
      const int query = query_begin + first_query + row;
      const T* const output = row_of<T>(a.output, batch, head, query);
      const T* const grad_output = row_of<T>(f.g.grad_output, batch, head, query);
      for (int column = lane() % 4 * kSize; column < head_dim(); column += 4 * kSize) {
        const Chunk<T> outputs = load_chunk(output, column), gradients = load_chunk(grad_output, column);
        EMPCAUSE_UNROLL
        for (int i = 0; i < kSize; ++i) sums[i] = fma(to_float(outputs.at[i]), to_float(gradients.at[i]), sums[i]);
      }
    }
    EMPCAUSE_UNROLL
    for (int count = kSize / 2; count > 0; count /= 2) {
      EMPCAUSE_UNROLL
      for (int i = 0; i < count; ++i) sums[i] += sums[i + count];
    }
    const float total = quad_sum(sums[0]), result = sees_a_key ? total : 0.0f;
    if (row < rows && lane_column() == 0) {
      store_global(row_of(f.delta, batch, head, query_begin + first_query + row), result);
    }
    return result;
  }

  template <bool kMasked>
  EMPCAUSE_DEVICE void attend_backward(int tile) {
    Fragment<Shape::kRowTiles, kColumns / 8> logit, grad_logit;
    multiply(logit, query_tile(), warp_row, key_tile(tile));
    multiply(grad_logit, grad_output_tile(), warp_row, value_tile(tile));
    Kept<Shape::kRowTiles> kept;
    if constexpr (kDropout) {
      kept = Dropout(a, f.dropout, batch, head)
                 .template kept<Shape::kRowTiles, kColumns / 8>(first_query + warp_row, tile * kColumns);
    }
    const float scale = a.scale * kLog2E;
    EMPCAUSE_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      const TwoFloats log2_weights = load_shared<TwoFloats>(log2_weight(tile, n * 8 + lane_column()));
      EMPCAUSE_UNROLL
      for (int m = 0; m < Shape::kRowTiles; ++m) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int column = n * 8 + lane_column() + i % 2, half = i / 2;
          float& gradient = grad_logit.at[m][n][i];
          if constexpr (kDropout) gradient = kept.at(m, n, i) ? gradient * f.dropout.kept_factor : 0.0f;
          // The rows of an absent key were copied as zeros, so that its log2_weight of -infinity is added to a
          // finite logit.
          const float b = exponential<false>(logit.at[m][n][i], scale, log2_weights.at[i % 2], lse[m][half]);
          const bool hidden = kMasked && tile * kColumns + column > row0_last_key + fragment_row(m, half);
          gradient = hidden ? 0.0f : b * (gradient - delta[m][half]);
        }
      }
    }
    accumulate(grad_query, grad_logit, key_tile(tile), 0);
  }

  const BackwardArguments& f;
  const Attention& a;
  const int batch, head, first_query, warp_row;
  int query_begin, key_begin, num_keys, rows;
  int row0_last_key;  // the last key that row 0 of the block sees
  int tiles;

  Fragment<Shape::kRowTiles, kHeadDim / 8> grad_query;
  LogSumExp<T> lse[Shape::kRowTiles][2];
  float delta[Shape::kRowTiles][2];
};

template <class T, int kHeadDim, bool kDropout>
struct BackwardQueriesKernel {
  using Block = BackwardQueriesBlock<T, kHeadDim, kDropout>;
  using Arguments = BackwardArguments;
  static constexpr int kThreads = Block::Shape::kThreads, kMinBlocks = Block::Shape::kMinBlocks;
  static constexpr uint32_t kSharedBytes = Block::kSharedBytes;

  static int64_t num_blocks(const Attention& a) { return a.batch * a.num_heads * Block::row_blocks(a); }

  static EMPCAUSE_DEVICE void run(const BackwardArguments& f) {
    const int row_blocks = Block::row_blocks(f.g.forward), block = static_cast<int>(block_index().x);
    const int row_block = block % row_blocks;
    // Under a causal mask the last rows have the most keys, so their blocks start first.
    Block(f, f.g.forward.causal ? row_blocks - 1 - row_block : row_block, block / row_blocks).run();
  }
};

}  // namespace empcause::cuda
