// The functions of device.h for GPUs from sm_80 on. device.h includes this file under nvcc.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

// The function that assert() calls. Unlike assert(), it is called in release builds too.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line, const char* function,
                                        size_t character_size) noexcept;

namespace empcause::cuda {

EMPCAUSE_DEVICE uint32_t thread_index() { return threadIdx.x; }
EMPCAUSE_DEVICE uint32_t lane_index() { return threadIdx.x % 32; }
EMPCAUSE_DEVICE uint32_t warp_index() { return threadIdx.x / 32; }
EMPCAUSE_DEVICE Index3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

EMPCAUSE_DEVICE void sync_block() { __syncthreads(); }
EMPCAUSE_DEVICE int sync_block_count(bool condition) { return __syncthreads_count(condition); }
EMPCAUSE_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
EMPCAUSE_DEVICE T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  return __shfl_sync(0xffffffffu, value, lane);
}

template <class T>
EMPCAUSE_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) == 4);
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

EMPCAUSE_DEVICE bool any_lane(bool condition) { return __any_sync(0xffffffffu, condition) != 0; }

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

EMPCAUSE_DEVICE Shared shared_memory() {
  return {static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory))};
}

template <class T>
EMPCAUSE_DEVICE T load_shared(Shared from) {
  static_assert(kOneAccess<T> && sizeof(T) >= 2);
  return *static_cast<const T*>(__cvta_shared_to_generic(from.address));
}

template <class T>
EMPCAUSE_DEVICE void store_shared(Shared to, T value) {
  static_assert(kOneAccess<T> && sizeof(T) >= 2);
  *static_cast<T*>(__cvta_shared_to_generic(to.address)) = value;
}

template <class T>
EMPCAUSE_DEVICE T load_global(const T* from) {
  static_assert(kOneAccess<T>);
  return *from;
}

template <class T>
EMPCAUSE_DEVICE void store_global(T* to, T value) {
  static_assert(kOneAccess<T>);
  *to = value;
}

EMPCAUSE_DEVICE void copy_async(Shared to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address), "l"(__cvta_generic_to_global(from)),
               "r"(valid ? 16 : 0)
               : "memory");
}

EMPCAUSE_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
EMPCAUSE_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

EMPCAUSE_DEVICE void load_matrices(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

EMPCAUSE_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row.address)
               : "memory");
}

template <class T>
EMPCAUSE_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
EMPCAUSE_DEVICE void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
EMPCAUSE_DEVICE void mma<Float16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T>
EMPCAUSE_DEVICE uint32_t pack(float low, float high);

template <>
EMPCAUSE_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
EMPCAUSE_DEVICE uint32_t pack<Float16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

EMPCAUSE_DEVICE float to_float(float value) { return value; }
EMPCAUSE_DEVICE float to_float(BFloat16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }
EMPCAUSE_DEVICE float to_float(Float16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

template <class T>
EMPCAUSE_DEVICE T from_float(float value) {
  return {static_cast<uint16_t>(pack<T>(value, 0.0f))};
}

template <>
EMPCAUSE_DEVICE float from_float<float>(float value) {
  return value;
}

EMPCAUSE_DEVICE float exp2(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

EMPCAUSE_DEVICE float log2(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

EMPCAUSE_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
EMPCAUSE_DEVICE float add_rounded(float a, float b) { return __fadd_rn(a, b); }
EMPCAUSE_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EMPCAUSE_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

EMPCAUSE_DEVICE void require(bool condition, const char* message) {
  if (!condition) __assertfail(message, "empcause", 0, "kernel", sizeof(char));
}

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("empcause: ") + what + ": " + cudaGetErrorString(error));
  }
}

// Returns the number of multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "there is no current CUDA device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "the device does not tell the number of its multiprocessors");
  return count;
}

template <class Kernel>
// clang-format off
__global__ __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks) void run(
    const __grid_constant__ typename Kernel::Arguments arguments) {
  // clang-format on
  Kernel::run(arguments);
}

template <class Kernel>
void launch(Index3 grid, uint32_t shared_bytes, Stream stream, const typename Kernel::Arguments& arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr uint32_t kDefaultLimit = 48 * 1024;  // a kernel must opt in to more shared memory
  if (shared_bytes > kDefaultLimit) {
    constexpr auto kSize = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check(cudaFuncSetAttribute(run<Kernel>, kSize, static_cast<int>(shared_bytes)),
          "the shared memory of a kernel cannot be set");
  }
  const dim3 blocks(grid.x, grid.y, grid.z);
  run<Kernel><<<blocks, Kernel::kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), "a kernel cannot be launched");
}

}  // namespace empcause::cuda
