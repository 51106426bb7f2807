// device.h for the host. Included by device.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <typeinfo>

#include "emulator.h"

namespace empcause::cuda {

inline uint32_t thread_index() { return emulator::thread_index(); }
inline uint32_t lane_index() { return thread_index() % 32; }
inline uint32_t warp_index() { return thread_index() / 32; }
inline Index3 block_index() { return emulator::block_index(); }

inline void sync_block() { emulator::meet(emulator::Together::kBlockBarrier, nullptr, nullptr); }
inline void sync_warp() { emulator::meet(emulator::Together::kWarpBarrier, nullptr, nullptr); }

template <class T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) == 4);
  struct Exchange {
    T given, taken;
    int lane;
  } mine{value, value, lane};
  emulator::meet(emulator::Together::kShuffle, &mine, [](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* exchange = static_cast<Exchange*>(lanes[i]);
      exchange->taken = static_cast<Exchange*>(lanes[exchange->lane % 32])->given;
    }
  });
  return mine.taken;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, static_cast<int>(lane_index()) ^ mask);
}

inline Shared shared_memory() { return {0}; }

template <class T>
T load_shared(Shared from) {
  static_assert(std::is_trivially_copyable_v<T>);
  T value;
  std::memcpy(&value, emulator::read_shared(thread_index(), from.address, sizeof(T)), sizeof(T));
  return value;
}

template <class T>
void store_shared(Shared to, T value) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::memcpy(emulator::write_shared(to.address, sizeof(T)), &value, sizeof(T));
}

template <class T>
T load_global(const T* from) {
  emulator::check_global(from, sizeof(T));
  return *from;
}

template <class T>
void store_global(T* to, T value) {
  emulator::check_global(to, sizeof(T));
  *to = value;
}

inline void copy_async(Shared to, const void* from, bool valid) { emulator::copy_async(to.address, from, 16, valid); }
inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

namespace emulator {

struct MatrixLoad {
  uint32_t row;  // this lane's row of 8 values: lane 8 m + i has row i of matrix m
  uint32_t (*registers)[4];
};

// Lane 4 g + t receives the elements (g, 2t) and (g, 2t + 1) of each matrix, transposed (2t, g) and (2t + 1, g).
template <bool kTransposed>
void load_matrices(void* const* lanes) {
  uint16_t element[4][8][8];
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const auto* load = static_cast<const MatrixLoad*>(lanes[lane]);
    const uint32_t thread = thread_index() / 32 * 32 + lane;
    std::memcpy(element[lane / 8][lane % 8], read_shared(thread, load->row, 16), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const auto& e = element[m];
      const uint32_t low = kTransposed ? e[2 * t][g] : e[g][2 * t], high = kTransposed ? e[2 * t + 1][g] : e[g][2 * t + 1];
      (*static_cast<MatrixLoad*>(lanes[lane])->registers)[m] = low | high << 16;
    }
  }
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], Shared row) {
  emulator::MatrixLoad mine{row.address, &r};
  emulator::meet(emulator::Together::kLoadMatrices, &mine, emulator::load_matrices<false>);
}

inline void load_matrices_transposed(uint32_t (&r)[4], Shared row) {
  emulator::MatrixLoad mine{row.address, &r};
  emulator::meet(emulator::Together::kLoadMatricesTransposed, &mine, emulator::load_matrices<true>);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) { return std::bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }
inline float to_float(Float16 value) { return static_cast<float>(std::bit_cast<_Float16>(value.bits)); }

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
inline Float16 from_float<Float16>(float value) {
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
}

template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

namespace emulator {

struct Product {
  float (*c)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

// Lane 4 g + t holds of A the pairs at rows g, g + 8 and columns 2t, 2t + 8 (in the order (g, 2t), (g + 8, 2t), (g, 2t + 8),
// (g + 8, 2t + 8)); of B those at rows 2t, 2t + 8 of column g; of C the elements (g, 2t), (g, 2t + 1), (g + 8, 2t),
// (g + 8, 2t + 1). A GPU's order of summation is its own affair; here the sum is exact but for one rounding at the end.
template <class T>
void mma(void* const* lanes) {
  const auto value = [](uint32_t packed, int half) { return double{to_float(T{static_cast<uint16_t>(packed >> 16 * half)})}; };
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* product = static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value((*product->a)[i], half);
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + half][g] = value((*product->b)[i], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float(&c)[4] = *static_cast<const Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      double total = double{c[i]};
      for (int k = 0; k < 16; ++k) total += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
      c[i] = static_cast<float>(total);
    }
  }
}

}  // namespace emulator

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulator::Product mine{&c, &a, &b};
  emulator::meet(emulator::Together::kMma, &mine, emulator::mma<T>);
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float multiply(float a, float b) {
  const volatile float product = a * b;  // not contracted with a sum
  return product;
}
inline float add(float a, float b) { return a + b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

// Few, so that small problems are divided too.
inline int multiprocessors() { return 8; }

template <class Kernel>
void launch(Index3 grid, uint32_t shared_bytes, Stream, const typename Kernel::Arguments& arguments) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Arguments>);
  emulator::launch(typeid(Kernel).name(), grid, Kernel::kThreads, shared_bytes, [&] { Kernel::run(arguments); });
}

}  // namespace empcause::cuda
