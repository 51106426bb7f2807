// The interface to the machine: the bodies of kernels are plain C++ that uses the GPU through these
// functions alone. nvcc compiles them to instructions of the GPU. Any other C++ compiler builds the
// same bodies for the host, where emulator/ executes the instructions and checks them.
//
//   thread_index, lane_index, warp_index, block_index     blocks of threads have one dimension, grids up to three
//   sync_block, sync_warp                                 barriers that all threads of the block or warp must reach
//   sync_block_count                                      sync_block that returns how many threads pass true
//   shuffle, shuffle_xor                                  exchange 4-byte values in a warp; all lanes must take part
//   any_lane                                              whether any lane of the warp passes true; all must take part
//   shared_memory                                         the block's dynamic shared memory, addressed in bytes
//   load_shared, store_shared, load_global, store_global  1 (global only) to 16 bytes, aligned to their number
//   copy_async, copy_async_commit, copy_async_wait        16 bytes from global to shared memory, or zeros if not
//                                                         `valid`; waiting ends when at most kPending groups of this
//                                                         thread are under way; other threads see the bytes after
//                                                         sync_block
//   load_matrices, load_matrices_transposed               ldmatrix: four 8 x 8 matrices of 16-bit values
//   mma                                                   C[16, 8] += A[16, 16] B[16, 8], fp32 sums of 16-bit products
//   pack, to_float, from_float                            conversions, to nearest even; pack's `low` is the lower half
//   exp2, log2                                            approximate; subnormal numbers count as 0
//   multiply_rounded, add_rounded, fma                    each rounded once, never contracted to another operation
//   multiply_high                                         the high 32 bits of a product of 32-bit integers
//   require                                               an assertion on the device
//   multiprocessors, launch                               called by the host; a grid without blocks is not launched
//
// A kernel is a struct with `kThreads` (threads of a block, whole warps), `kMinBlocks` (how many
// blocks a multiprocessor must have registers for), a trivially copyable `Arguments`, and `static
// EMPCAUSE_DEVICE void run(const Arguments&)`.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)
#define EMPCAUSE_DEVICE __device__ __forceinline__
#define EMPCAUSE_ANYWHERE __host__ __device__ __forceinline__
#else
#define EMPCAUSE_DEVICE inline
#define EMPCAUSE_ANYWHERE inline
#endif

namespace empcause::cuda {

using Stream = void*;  // a cudaStream_t

struct Index3 {
  uint32_t x, y, z;
};

// An address in the block's shared memory, in bytes.
struct Shared {
  uint32_t address;
};

EMPCAUSE_ANYWHERE Shared operator+(Shared shared, uint32_t bytes) { return {shared.address + bytes}; }

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// Whether one instruction loads or stores a T.
template <class T>
constexpr bool kOneAccess = sizeof(T) == alignof(T) && sizeof(T) <= 16 && std::is_trivially_copyable_v<T>;

}  // namespace empcause::cuda

#if defined(__CUDACC__)
#include "gpu.h"
#else
#include "emulator/device.h"
#endif
