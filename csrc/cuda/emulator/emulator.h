// Runs kernels on the host as a GPU would, and finds what a GPU lets pass. The lanes of a block are fibers; a lane runs
// until it must wait for others. Each of these ends a launch with a std::runtime_error that names kernel, block and thread:
//   - shared memory: reading bytes that nobody wrote, or whose asynchronous copy was not waited for; leaving the launch's
//     size; misalignment; a race, that is bytes written by one thread and touched by another without a barrier between
//   - barriers and exchanges that not all threads of the block, or lanes of the warp, reach
//   - global memory outside of what the caller allowed; misalignment
// Blocks are spread over host threads, as they do not know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace empcause::cuda {

struct Index3;

namespace emulator {

// Kernels may touch [pointer, pointer + bytes) from now on, until forbid_all.
void allow(const void* pointer, size_t bytes);
void forbid_all();

// What all lanes of a warp, or all threads of a block, do together.
enum class Together { kBlockBarrier, kWarpBarrier, kShuffle, kLoadMatrices, kLoadMatricesTransposed, kMma };

// Of the running thread.
uint32_t thread_index();
Index3 block_index();

// Waits for all; the last to arrive calls complete with what each of them passed, in the order of lanes.
using Complete = void (*)(void* const* lanes);
void meet(Together what, void* mine, Complete complete);

// Checked access to shared memory. What is read or written belongs to thread `thread`.
const void* read_shared(uint32_t thread, uint32_t address, uint32_t bytes);
void* write_shared(uint32_t address, uint32_t bytes);

// Throws unless the range is allowed and aligned to its size.
void check_global(const void* pointer, uint32_t bytes);

void copy_async(uint32_t to, const void* from, uint32_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

void launch(const char* kernel, Index3 grid, int threads, uint32_t shared_bytes, const std::function<void()>& run);

}  // namespace emulator
}  // namespace empcause::cuda
