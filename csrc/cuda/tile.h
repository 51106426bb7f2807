// Rows of query, key, value or grad_output in shared memory, and how they are copied between global
// memory, shared memory and registers.
#pragma once

#include "../attention.h"
#include "fragment.h"

namespace empcause::cuda {

constexpr int kChunkBytes = 16;

// The values that one 16-byte access moves.
template <class T>
struct alignas(kChunkBytes) Chunk {
  static constexpr int kSize = kChunkBytes / sizeof(T);
  T at[kSize];
};

struct alignas(8) TwoFloats {
  float at[2];
};

// Sequences have fewer rows than this (dispatch.cu), so that the sum of two indices of rows fits an int.
constexpr int kMostRows = 1 << 30;

// Returns the address of a row. Indices fit 32 bits, offsets do not. The indices are unsigned, as the sign of an index
// would take a register of its own.
template <class T>
EMPCAUSE_DEVICE T* row_of(const Matrices& m, uint32_t batch, uint32_t head, uint32_t row) {
  return static_cast<T*>(m.data) + batch * m.batch + head * m.head + row * m.row;
}

EMPCAUSE_DEVICE float* row_of(const Rows& r, uint32_t batch, uint32_t head, uint32_t row) {
  return r.data + batch * r.batch + head * r.head + row;
}

// Returns the weight of a key; all are 1 where none are stored.
EMPCAUSE_DEVICE float weight_of(const Attention& a, uint32_t batch, uint32_t head, uint32_t row) {
  return a.weight.data == nullptr ? 1.0f : load_global(row_of(a.weight, batch, head, row));
}

// Rows of kHeadDim columns in shared memory, in chunks of 16 bytes. Chunk c of a row is stored in place c ^
// swizzle(row). Then one chunk of eight neighbouring rows, which ldmatrix reads at once, covers all 32 banks, and
// one chunk of four rows of the same parity, which the fp32 product reads at once, covers 16 different banks.
template <class T, int kHeadDim>
struct Tile {
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static_assert(kChunks % 4 == 0);

  // How many places the chunks of different rows are spread over. Rows of whole 128-byte lines need
  // eight; of other rows, two neighbours begin in different halves of a line, so four suffice.
  static constexpr int kPlaces = kChunks % 8 == 0 ? 8 : 4;

  Shared start;  // a multiple of 128

  static EMPCAUSE_DEVICE int swizzle(int row) { return kPlaces == 8 ? row % 8 : row / 2 % 4; }

  EMPCAUSE_DEVICE Shared chunk(int row, int index) const {
    return start + static_cast<uint32_t>(row * kRowBytes + (index ^ swizzle(row)) * kChunkBytes);
  }

  // Returns the address of the chunk that is `rows` rows, a multiple of 8, and `chunks` chunks, a multiple of 2, after
  // `chunk`, which is chunk 0 or 1 of a row. Where both are constants this takes one or two instructions.
  static EMPCAUSE_DEVICE Shared advance(Shared chunk, int rows, int chunks) {
    const int within = chunks % kPlaces;
    return Shared{chunk.address ^ static_cast<uint32_t>(within * kChunkBytes)} +
           static_cast<uint32_t>(rows * kRowBytes + (chunks - within) * kChunkBytes);
  }

  EMPCAUSE_DEVICE Shared element(int row, int column) const {
    constexpr int kSize = Chunk<T>::kSize;
    return chunk(row, column / kSize) + static_cast<uint32_t>(column % kSize) * static_cast<uint32_t>(sizeof(T));
  }
};

// A tile to fill and the rows to copy into it: the address of the first row and the stride. In
// decoding, `group` rows are one query of as many heads; then `stride` is from one query to the next,
// `group_stride` from one head to the next.
template <class T, int kHeadDim>
struct Copy {
  Tile<T, kHeadDim> to;
  const T* from;
  int64_t stride;
  uint32_t group = 1;
  int64_t group_stride = 0;

  EMPCAUSE_DEVICE const T* row(uint32_t index) const {
    return from + index / group * stride + index % group * group_stride;
  }
};

// Copies kRows rows of each Copy. Rows for which keep(row) is false and columns beyond head_dim become zeros. Rows of
// whole, aligned chunks are copied asynchronously, other rows element by element.
template <int kRows, int kThreads, class Keep, class T, int kHeadDim, class... More>
EMPCAUSE_DEVICE void copy_rows(int head_dim, bool whole_chunks, Keep keep, Copy<T, kHeadDim> first, More... more) {
  constexpr int kChunks = Tile<T, kHeadDim>::kChunks;
  static_assert(kRows * kChunks % kThreads == 0);
  // Addresses of several chunks at once take registers, which are scarce where rows are long.
  [[maybe_unused]] constexpr int kUnroll = kHeadDim < 128 ? 4 : 1;
  if (whole_chunks) {
    const auto step = [&](int row, int chunk) {
      const int column = chunk * Chunk<T>::kSize;
      const bool valid = keep(row) && column < head_dim;
      const auto copy = [&](const Copy<T, kHeadDim>& c) {
        copy_async(c.to.chunk(row, chunk), c.row(row) + column, valid);
      };
      copy(first);
      (copy(more), ...);
    };
    EMPCAUSE_UNROLL_BY(kUnroll)
    for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
      if constexpr (kThreads % kChunks == 0) {
        step(thread() / kChunks + i * (kThreads / kChunks), thread() % kChunks);
      } else {
        step((thread() + i * kThreads) / kChunks, (thread() + i * kThreads) % kChunks);
      }
    }
  } else {
    EMPCAUSE_UNROLL_BY(1)
    for (int index = thread(); index < kRows * kHeadDim; index += kThreads) {
      const int row = index / kHeadDim, column = index % kHeadDim;
      const bool valid = keep(row) && column < head_dim;
      const auto copy = [&](const Copy<T, kHeadDim>& c) {
        store_shared(c.to.element(row, column), valid ? load_global(c.row(row) + column) : T{});
      };
      copy(first);
      (copy(more), ...);
    }
  }
}

// Stores the rows of a fragment, times factor(m, half), in global memory: its columns are those from
// `first_column` on of the row at pointer(m, half). Nothing is stored where the pointer is null. The four
// lanes of a row exchange four tiles at a time, so that each lane stores eight neighbouring columns.
template <class T, int kRowTiles, int kColumnTiles, class Factor, class Pointer>
EMPCAUSE_DEVICE void store_rows(const Fragment<kRowTiles, kColumnTiles>& rows, int first_column, int head_dim,
                                bool whole_chunks, Factor factor, Pointer pointer) {
  static_assert(kColumnTiles % 4 == 0);
  EMPCAUSE_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    EMPCAUSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      T* const to = pointer(m, half);
      const float scale = factor(m, half);
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumnTiles; n += 4) {
        float even[4], odd[4];
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          even[i] = rows.at[m][n + i][2 * half] * scale;
          odd[i] = rows.at[m][n + i][2 * half + 1] * scale;
        }
        transpose(even, 1);
        transpose(odd, 1);
        if (to == nullptr) continue;
        EMPCAUSE_UNROLL
        for (int first = 0; first < 8; first += Chunk<T>::kSize) {
          const int column = first_column + (n + lane() % 4) * 8 + first;
          Chunk<T> values;
          EMPCAUSE_UNROLL
          for (int e = 0; e < Chunk<T>::kSize; ++e) {
            values.at[e] = from_float<T>((e % 2 == 0 ? even : odd)[(first + e) / 2]);
          }
          if (whole_chunks) {
            if (column < head_dim) store_global(reinterpret_cast<Chunk<T>*>(to + column), values);
          } else {
            EMPCAUSE_UNROLL
            for (int e = 0; e < Chunk<T>::kSize; ++e) {
              if (column + e < head_dim) store_global(to + column + e, values.at[e]);
            }
          }
        }
      }
    }
  }
}

}  // namespace empcause::cuda
