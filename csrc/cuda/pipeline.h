// The loop over tiles that the kernels share, a software pipeline: while a tile is computed, the next one is copied.
#pragma once

#include "fragment.h"

namespace empcause::cuda {

// How many buffers in shared memory there are for the rows of tiles.
constexpr int kTileStages = 2;
// How many there are for the values of tiles. Each row of a tile has one value: a key its weight, a
// query its LSE and delta.
constexpr int kValueStages = 3;

// Runs a block through tiles [0, count) of kColumns rows each. The values of a tile decide which of its rows are copied,
// so they are fetched one tile before the rows. A Block has
//   fetch(tile)             loads this thread's value of a tile; called for two tiles beyond the last one, too
//   publish(tile, value)    stores the value in shared memory, in buffer tile % kValueStages, and returns whether its
//                           row is absent, that is, takes no part
//   copy(tile, absent)      begins to copy the rows to buffer tile % kTileStages; `absent` is how many are absent
//   compute(tile, absent)   computes the tile
// A buffer of values is overwritten three tiles later, and a barrier separates that from its last read. The same barrier
// counts the absent rows, which takes no time of its own.
template <class Block>
EMPCAUSE_DEVICE void pipeline(int count, Block& block) {
  const bool first_is_absent = block.publish(0, block.fetch(0));
  auto next = block.fetch(1);
  int absent = sync_block_count(first_is_absent);
  if (count > 0) block.copy(0, absent);
  copy_async_commit();
  for (int tile = 0; tile < count; ++tile) {
    const bool next_is_absent = block.publish(tile + 1, next);
    next = block.fetch(tile + 2);
    copy_async_wait<0>();
    const int next_absent = sync_block_count(next_is_absent);
    if (tile + 1 < count) block.copy(tile + 1, next_absent);
    copy_async_commit();
    block.compute(tile, absent);
    absent = next_absent;
  }
}

}  // namespace empcause::cuda
