// The two matrix products of attention, computed by one warp: with matrix instructions for bf16 and fp16, with fused
// multiply-adds for fp32.
//
//   multiply     C = A B^T    A and B are rows in shared memory; for logits and grad_output . value
//   accumulate   C += P B     P is a fragment, B are rows in shared memory; for all other products
#pragma once

#include <type_traits>

#include "tile.h"

namespace empcause::cuda {

// Multiplies 16 kRowTiles rows of `a`, from `first_row` on, by the first 8 kColumnTiles rows of `b`.
template <class T, int kHeadDim, int kRowTiles, int kColumnTiles>
EMPCAUSE_DEVICE void multiply(Fragment<kRowTiles, kColumnTiles>& c, Tile<T, kHeadDim> a, int first_row,
                              Tile<T, kHeadDim> b) {
  c.clear();
  if constexpr (std::is_same_v<T, float>) {
    // A long sum in one chain rounds more than a sum of the chunks' sums, which costs an addition in five operations.
    constexpr bool kInParts = kHeadDim > 64;
    EMPCAUSE_UNROLL_BY(1)
    for (int k = 0; k < Tile<T, kHeadDim>::kChunks; ++k) {
      Chunk<float> left[kRowTiles][2];
      EMPCAUSE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        EMPCAUSE_UNROLL
        for (int half = 0; half < 2; ++half) {
          left[m][half] = load_shared<Chunk<float>>(a.chunk(first_row + m * 16 + half * 8 + lane_row(), k));
        }
      }
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const auto right = load_shared<Chunk<float>>(b.chunk(n * 8 + lane_column() + i, k));
          EMPCAUSE_UNROLL
          for (int m = 0; m < kRowTiles; ++m) {
            EMPCAUSE_UNROLL
            for (int half = 0; half < 2; ++half) {
              float& sum = c.at[m][n][2 * half + i];
              float part = kInParts ? 0.0f : sum;
              EMPCAUSE_UNROLL
              for (int e = 0; e < 4; ++e) part = fma(left[m][half].at[e], right.at[e], part);
              sum = kInParts ? sum + part : part;
            }
          }
        }
      }
    }
  } else {
    static_assert(kColumnTiles % 2 == 0);
    // ldmatrix takes the address of a row from every lane: eight lanes for each of the four 8 x 8 matrices.
    const Shared a_chunk = a.chunk(first_row + lane() % 16, lane() / 16);
    const Shared b_chunk = b.chunk(lane() % 8 + lane() / 16 * 8, lane() / 8 % 2);
    EMPCAUSE_UNROLL
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t left[kRowTiles][4];
      EMPCAUSE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) load_matrices(left[m], a.advance(a_chunk, m * 16, 2 * k));
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t right[4];
        load_matrices(right, b.advance(b_chunk, n * 8, 2 * k));
        EMPCAUSE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(c.at[m][n], left[m], {right[0], right[1]});
          mma<T>(c.at[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }
}

// Multiplies P, which has 8 kDepthTiles columns, by the first 8 kDepthTiles rows of `b`, and adds
// columns [first_column, first_column + 8 kColumnTiles) of the product to C.
template <class T, int kHeadDim, int kRowTiles, int kDepthTiles, int kColumnTiles>
EMPCAUSE_DEVICE void accumulate(Fragment<kRowTiles, kColumnTiles>& c, const Fragment<kRowTiles, kDepthTiles>& p,
                                Tile<T, kHeadDim> b, int first_column) {
  if constexpr (std::is_same_v<T, float>) {
    // Every lane of a quad needs the whole row of P, of which each lane holds two columns in eight.
    EMPCAUSE_UNROLL_BY(1)
    for (int column = 0; column < 8; ++column) {
      const int owner = lane() / 4 * 4 + column / 2;
      const bool odd = column % 2 != 0;
      const Shared b_chunk = b.chunk(column, lane_column() / 4) + static_cast<uint32_t>(lane_column() % 4 * 4);
      EMPCAUSE_UNROLL
      for (int k = 0; k < kDepthTiles; ++k) {
        float left[kRowTiles][2];
        EMPCAUSE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          EMPCAUSE_UNROLL
          for (int half = 0; half < 2; ++half) {
            left[m][half] = shuffle(odd ? p.at[m][k][2 * half + 1] : p.at[m][k][2 * half], owner);
          }
        }
        EMPCAUSE_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          const auto right = load_shared<TwoFloats>(b.advance(b_chunk, k * 8, first_column / 4 + 2 * n));
          EMPCAUSE_UNROLL
          for (int m = 0; m < kRowTiles; ++m) {
            EMPCAUSE_UNROLL
            for (int i = 0; i < 4; ++i) c.at[m][n][i] = fma(left[m][i / 2], right.at[i % 2], c.at[m][n][i]);
          }
        }
      }
    }
  } else {
    static_assert(kDepthTiles % 2 == 0 && kColumnTiles % 2 == 0);
    const Shared b_chunk = b.chunk(lane() % 16, lane() / 16);
    EMPCAUSE_UNROLL
    for (int k = 0; k < kDepthTiles; k += 2) {
      // The elements of two neighbouring tiles of P are, rounded, one operand of mma: no lane needs those of another.
      uint32_t left[kRowTiles][4];
      EMPCAUSE_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float* two = &p.at[m][k + i / 2][i % 2 * 2];
          left[m][i] = pack<T>(two[0], two[1]);
        }
      }
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t right[4];
        load_matrices_transposed(right, b.advance(b_chunk, k * 8, first_column / 8 + n));
        EMPCAUSE_UNROLL
        for (int m = 0; m < kRowTiles; ++m) {
          mma<T>(c.at[m][n], left[m], {right[0], right[1]});
          mma<T>(c.at[m][n + 1], left[m], {right[2], right[3]});
        }
      }
    }
  }
}

}  // namespace empcause::cuda
