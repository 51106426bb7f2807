// Runs kernels on the host as a GPU would, and finds what a GPU lets pass. The lanes of a block are fibers; a lane runs
// until it must wait for others. Each of these ends a launch with a std::runtime_error that names place, kernel, block
// and thread:
//   - shared memory: reading bytes that nobody wrote; touching bytes to which an asynchronous copy is under way;
//     leaving the launch's size; misalignment; a race, that is bytes written by one thread and touched by another
//     without a barrier between
//   - barriers and exchanges that not all threads of the block, or lanes of the warp, reach at the same place
//   - global memory outside of what the caller allowed; misalignment
//   - require(false)
// Blocks are spread over host threads, as they do not know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace empcause::cuda {

struct Index3;

namespace emulator {

// Kernels may touch [pointer, pointer + bytes) from now on, until forbid_all. There is one list of this: callers take
// turns.
void allow(const void* pointer, size_t bytes);
void forbid_all();

// Where a kernel calls the emulator.
using Source = std::source_location;

// Ends the launch.
[[noreturn]] void fail(const std::string& what, const Source& source);

// Of the running thread.
uint32_t thread_index();
Index3 block_index();

// What all lanes of a warp, or all threads of a block, do together.
enum class Together { kBlockBarrier, kWarpBarrier, kShuffle, kLoadMatrices, kLoadMatricesTransposed, kMma };

// Waits for all; the last to arrive calls complete with what each of them passed, in the order of lanes.
using Complete = void (*)(void* const* lanes);
void meet(Together what, const Source& source, void* mine = nullptr, Complete complete = nullptr);

// Checked access to shared memory: where to read or write.
const void* read_shared(uint32_t address, uint32_t size, const Source& source);
void* write_shared(uint32_t address, uint32_t size, const Source& source);

// Fails unless the bytes are allowed and aligned to their number.
void check_global(const void* pointer, uint32_t size, const Source& source);

void copy_async(uint32_t to, const void* from, uint32_t size, bool valid, const Source& source);
void copy_async_commit();
void copy_async_wait(size_t pending);

// `run` is the kernel's body; `kernel` its name, as typeid has it.
void launch(const char* kernel, Index3 grid, int threads, uint32_t shared_bytes, const std::function<void()>& run);

}  // namespace emulator
}  // namespace empcause::cuda
