// The loop over tiles that all kernels share: while a tile is worked on, the next one is on its way.
#pragma once

#include "fragment.h"

namespace empcause::cuda {

constexpr int kTileStages = 2;
// Of what stands beside a tile's rows, one value each: a key's weight, or a query's log-sum-exp.
constexpr int kValueStages = 3;

// Tiles [0, count) of a Block. The values of a tile decide which of its rows are copied, so they run one tile ahead of
// the rows:
//   fetch(tile)             this thread's value of a tile, also of the two beyond the last one
//   publish(tile, value)    to shared memory, stage tile % kValueStages
//   copy(tile)              begins to copy the rows, stage tile % kTileStages
//   compute(tile)
// A stage of values is written again three tiles later, with a barrier after its last reader.
template <class Block>
EMPCAUSE_DEVICE void pipeline(int count, Block& block) {
  block.publish(0, block.fetch(0));
  auto next = block.fetch(1);
  sync_block();
  if (count > 0) block.copy(0);
  copy_async_commit();
  for (int tile = 0; tile < count; ++tile) {
    block.publish(tile + 1, next);
    next = block.fetch(tile + 2);
    copy_async_wait<0>();
    sync_block();
    if (tile + 1 < count) block.copy(tile + 1);
    copy_async_commit();
    block.compute(tile);
  }
}

}  // namespace empcause::cuda
