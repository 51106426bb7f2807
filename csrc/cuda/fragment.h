// Who owns what in a warp. Every matrix that a warp holds in registers is divided as mma.m16n8k16 divides its result,
// for fp32 too, so that masks, softmax and dropout are written once: in a tile of 16 rows by 8 columns lane 4 g + t
// owns the elements (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1), in this order.
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
constexpr float kLog2E = 1.4426950408889634f;

// kRowTiles by kColumnTiles tiles of one warp.
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

// The same for all lanes, and the compiler sees it: branches upon it leave the warp together.
EMPCAUSE_DEVICE int uniform_warp() { return shuffle(static_cast<int>(warp_index()), 0); }

// Of the lane's first element in a tile.
EMPCAUSE_DEVICE int lane_row() { return lane() / 4; }
EMPCAUSE_DEVICE int lane_column() { return lane() % 4 * 2; }

// Over the four lanes that share a row; all of them get the result.
EMPCAUSE_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

EMPCAUSE_DEVICE float quad_maximum(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}

EMPCAUSE_DEVICE float warp_sum(float value) {
  EMPCAUSE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Between lanes that differ in the bit `mask`: the lower one's `high` and the upper one's `low` change places.
template <class T>
EMPCAUSE_DEVICE void exchange(T& low, T& high, int mask) {
  const bool upper = (lane() & mask) != 0;
  const T received = shuffle_xor(upper ? low : high, mask);
  low = upper ? received : low;
  high = upper ? high : received;
}

// Among four lanes that differ in the bits `mask` and 2 `mask`: the lane of number t gets the others' element t, in the
// order of the lanes.
template <class T>
EMPCAUSE_DEVICE void transpose(T (&element)[4], int mask) {
  exchange(element[0], element[1], mask);
  exchange(element[2], element[3], mask);
  exchange(element[0], element[2], 2 * mask);
  exchange(element[1], element[3], 2 * mask);
}

}  // namespace empcause::cuda
