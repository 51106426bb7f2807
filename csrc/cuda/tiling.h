// How the kernels divide their work, for every dtype and head size. A block has kWarps warps of 16
// kRowTiles rows each and goes through tiles of kColumns columns. A multiprocessor of sm_80 has
// registers and shared memory for kMinBlocks blocks.
//
// With two row tiles per warp, a product reads half as much from shared memory; with one, this takes as long as
// the product itself. There are two where the accumulators leave enough registers, so that none spills on
// sm_80, sm_90 and sm_100. No block needs more than 99 KiB of shared memory, which every GPU from sm_80 on has.
#pragma once

#include <type_traits>

namespace empcause::cuda {

template <int kWarps_, int kRowTiles_, int kColumns_, int kMinBlocks_>
struct Tiling {
  static constexpr int kWarps = kWarps_, kRowTiles = kRowTiles_, kColumns = kColumns_, kMinBlocks = kMinBlocks_;
  static constexpr int kThreads = kWarps * 32, kWarpRows = kRowTiles * 16, kRows = kWarps * kWarpRows;
  static_assert(kColumns % 16 == 0 && kColumns <= kThreads);
};

template <bool kFloat32, int kHeadDim>
struct Tilings;

// In Forward, Decode and BackwardQueries, rows are queries and columns are keys; Decode has one warp,
// as there are few queries. In BackwardKeys, rows are keys and columns are queries; it accumulates two
// gradients, and a block computes one of kSlices slices of their columns.
template <>
struct Tilings<false, 32> {
  using Forward = Tiling<4, 2, 64, 2>;
  using Decode = Tiling<1, 1, 32, 8>;
  using BackwardQueries = Tiling<4, 2, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 32, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<false, 64> {
  using Forward = Tiling<4, 2, 64, 2>;
  using Decode = Tiling<1, 1, 32, 8>;
  using BackwardQueries = Tiling<4, 2, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 32, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<false, 96> {
  using Forward = Tiling<4, 2, 32, 2>;
  using Decode = Tiling<1, 1, 32, 5>;
  using BackwardQueries = Tiling<4, 1, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 32, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<false, 128> {
  using Forward = Tiling<4, 1, 64, 2>;
  using Decode = Tiling<1, 1, 32, 4>;
  using BackwardQueries = Tiling<4, 1, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 16, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<false, 256> {
  using Forward = Tiling<4, 1, 32, 1>;
  using Decode = Tiling<1, 1, 16, 3>;
  using BackwardQueries = Tiling<4, 1, 16, 1>;
  using BackwardKeys = Tiling<4, 1, 16, 1>;
  static constexpr int kSlices = 2;
};

template <>
struct Tilings<true, 32> {
  using Forward = Tiling<4, 2, 32, 2>;
  using Decode = Tiling<1, 1, 32, 8>;
  using BackwardQueries = Tiling<4, 1, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 32, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<true, 64> {
  using Forward = Tiling<4, 2, 32, 2>;
  using Decode = Tiling<1, 1, 32, 4>;
  using BackwardQueries = Tiling<4, 1, 32, 2>;
  using BackwardKeys = Tiling<4, 1, 32, 2>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<true, 96> {
  using Forward = Tiling<4, 1, 32, 2>;
  using Decode = Tiling<1, 1, 32, 2>;
  using BackwardQueries = Tiling<4, 1, 32, 1>;
  using BackwardKeys = Tiling<4, 1, 32, 1>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<true, 128> {
  using Forward = Tiling<4, 1, 32, 1>;
  using Decode = Tiling<1, 1, 32, 2>;
  using BackwardQueries = Tiling<4, 1, 16, 1>;
  using BackwardKeys = Tiling<4, 1, 16, 1>;
  static constexpr int kSlices = 1;
};
template <>
struct Tilings<true, 256> {
  using Forward = Tiling<2, 1, 16, 1>;
  using Decode = Tiling<1, 1, 16, 2>;
  using BackwardQueries = Tiling<1, 1, 16, 1>;
  using BackwardKeys = Tiling<1, 1, 16, 1>;
  static constexpr int kSlices = 2;
};

template <class T, int kHeadDim>
using TilingsOf = Tilings<std::is_same_v<T, float>, kHeadDim>;

}  // namespace empcause::cuda
