// Runs kernels on the host as a GPU would, and detects errors that a GPU does not report. The threads
// of a block are fibers; a thread runs until it must wait for others. Each of these errors ends a
// launch with a std::runtime_error that names line, kernel, block and thread:
//   - in shared memory: a read of bytes that nobody wrote; an access to bytes to which an asynchronous copy is under
//     way; an access beyond the size of the launch; misalignment; a race, that is, bytes written by one thread and
//     accessed by another without a barrier between
//   - a barrier or exchange that not all threads of the block, or lanes of the warp, reach at the same line
//   - in global memory: an access outside of what the caller allowed; misalignment
//   - require(false)
// Blocks are independent of each other and run on several threads of the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace empcause::cuda {

struct Index3;

namespace emulator {

// Allows kernels to access global memory [pointer, pointer + bytes) until forbid_all is called. All
// launches share one list of allowed memory, so callers must not overlap in time.
void allow(const void* pointer, size_t bytes);
void forbid_all();

// The line of a kernel that calls the emulator.
using Source = std::source_location;

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& what, const Source& source);

// The indices of the running thread and its block.
uint32_t thread_index();
Index3 block_index();

// The operations that all lanes of a warp, or all threads of a block, execute together.
enum class Collective { kBlockBarrier, kWarpBarrier, kShuffle, kVote, kLoadMatrices, kLoadMatricesTransposed, kMma };

// Waits until all `count` threads have arrived. The last one calls complete(all, count), where all[i] is what thread i
// passed as `mine`.
using Complete = void (*)(void* const* all, size_t count);
void meet(Collective what, const Source& source, void* mine = nullptr, Complete complete = nullptr);

// Return how many kernels the process has launched, and how many matrix products (mma) their warps have computed.
uint64_t launches();
uint64_t products();

// Check an access to shared memory, and return where to read or write.
const void* read_shared(uint32_t address, uint32_t size, const Source& source);
void* write_shared(uint32_t address, uint32_t size, const Source& source);

// Fails unless the `size` bytes are allowed and aligned to `size`.
void check_global(const void* pointer, uint32_t size, const Source& source);

void copy_async(uint32_t to, const void* from, uint32_t size, bool valid, const Source& source);
void copy_async_commit();
void copy_async_wait(size_t pending);

// Runs all blocks of a grid. `run` is the body of the kernel, `kernel` its mangled name.
void launch(const char* kernel, Index3 grid, int threads, uint32_t shared_bytes, const std::function<void()>& run);

}  // namespace emulator
}  // namespace empcause::cuda
