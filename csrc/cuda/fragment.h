// Fragments: matrices in the registers of a warp. Their elements are divided among the lanes as mma.m16n8k16 divides
// its result, for fp32 too, so that masks, softmax and dropout are written once for all dtypes. In a tile of 16 rows
// by 8 columns, lane 4 g + t holds the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), in this order.
#pragma once

#include <math.h>

#include <limits>

#include "device.h"

#if defined(__CUDACC__)
#define EMPCAUSE_PRAGMA(text) _Pragma(#text)
#define EMPCAUSE_UNROLL EMPCAUSE_PRAGMA(unroll)
#define EMPCAUSE_UNROLL_BY(count) EMPCAUSE_PRAGMA(unroll count)
#else
#define EMPCAUSE_UNROLL
#define EMPCAUSE_UNROLL_BY(count)
#endif

namespace empcause::cuda {

constexpr int kWarp = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A matrix of kRowTiles by kColumnTiles tiles. at[m][n][i] is the lane's element i of tile (m, n). Elements
// 0 and 1 are in the upper half of the tile's rows (half 0), elements 2 and 3 in the lower one (half 1).
template <int kRowTiles, int kColumnTiles>
struct Fragment {
  float at[kRowTiles][kColumnTiles][4];

  EMPCAUSE_DEVICE void clear() {
    EMPCAUSE_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      EMPCAUSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        EMPCAUSE_UNROLL
        for (int i = 0; i < 4; ++i) at[m][n][i] = 0.0f;
      }
    }
  }
};

EMPCAUSE_DEVICE int lane() { return static_cast<int>(lane_index()); }
EMPCAUSE_DEVICE int thread() { return static_cast<int>(thread_index()); }

// Returns the index of the warp, in a form from which the compiler knows that it is the same for all
// lanes: then branches on it do not diverge.
EMPCAUSE_DEVICE int uniform_warp() { return shuffle(static_cast<int>(warp_index()), 0); }

// Row and column of the lane's first element in a tile.
EMPCAUSE_DEVICE int lane_row() { return lane() / 4; }
EMPCAUSE_DEVICE int lane_column() { return lane() % 4 * 2; }

// Sum and maximum over the quad, the four lanes that share a row; all of them get the result.
EMPCAUSE_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

EMPCAUSE_DEVICE float quad_maximum(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

// Swaps values between two lanes that differ in the bit `mask`: `high` of the lower lane with `low` of the upper one.
template <class T>
EMPCAUSE_DEVICE void exchange(T& low, T& high, int mask) {
  const bool upper = (lane() & mask) != 0;
  const T received = shuffle_xor(upper ? low : high, mask);
  low = upper ? received : low;
  high = upper ? high : received;
}

// Transposes four elements of each of four lanes, which differ in the bits `mask` and 2 `mask`:
// element i of lane t becomes element t of lane i.
template <class T>
EMPCAUSE_DEVICE void transpose(T (&element)[4], int mask) {
  exchange(element[0], element[1], mask);
  exchange(element[2], element[3], mask);
  exchange(element[0], element[2], 2 * mask);
  exchange(element[1], element[3], 2 * mask);
}

}  // namespace empcause::cuda
