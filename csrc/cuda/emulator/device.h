// The functions of device.h for the host. device.h includes this file unless nvcc compiles it.
// Functions that can fail have a parameter for the line that calls them, which the message names.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <typeinfo>

#include "../device.h"
#include "emulator.h"

namespace empcause::cuda {

inline uint32_t thread_index() { return emulator::thread_index(); }
inline uint32_t lane_index() { return thread_index() % 32; }
inline uint32_t warp_index() { return thread_index() / 32; }
inline Index3 block_index() { return emulator::block_index(); }

using emulator::Source;

inline void sync_block(Source source = Source::current()) {
  emulator::meet(emulator::Collective::kBlockBarrier, source);
}
inline int sync_block_count(bool condition, Source source = Source::current()) {
  int value = condition ? 1 : 0;
  emulator::meet(emulator::Collective::kBlockBarrier, source, &value, [](void* const* all, size_t count) {
    int total = 0;
    for (size_t i = 0; i < count; ++i) total += *static_cast<int*>(all[i]);
    for (size_t i = 0; i < count; ++i) *static_cast<int*>(all[i]) = total;
  });
  return value;
}
inline void sync_warp(Source source = Source::current()) { emulator::meet(emulator::Collective::kWarpBarrier, source); }

template <class T>
T shuffle(T value, int lane, Source source = Source::current()) {
  static_assert(sizeof(T) == 4);
  struct Exchange {
    T given, taken;
    int lane;
  } mine{value, value, lane};
  emulator::meet(emulator::Collective::kShuffle, source, &mine, [](void* const* lanes, size_t) {
    for (int i = 0; i < 32; ++i) {
      auto* exchange = static_cast<Exchange*>(lanes[i]);
      exchange->taken = static_cast<Exchange*>(lanes[exchange->lane & 31])->given;
    }
  });
  return mine.taken;
}

template <class T>
T shuffle_xor(T value, int mask, Source source = Source::current()) {
  return shuffle(value, static_cast<int>(lane_index()) ^ mask, source);
}

inline bool any_lane(bool condition, Source source = Source::current()) {
  emulator::meet(emulator::Collective::kVote, source, &condition, [](void* const* lanes, size_t count) {
    bool any = false;
    for (size_t i = 0; i < count; ++i) any |= *static_cast<bool*>(lanes[i]);
    for (size_t i = 0; i < count; ++i) *static_cast<bool*>(lanes[i]) = any;
  });
  return condition;
}

inline Shared shared_memory() { return {0}; }

template <class T>
T load_shared(Shared from, Source source = Source::current()) {
  static_assert(kOneAccess<T> && sizeof(T) >= 2);
  T value;
  std::memcpy(&value, emulator::read_shared(from.address, sizeof(T), source), sizeof(T));
  return value;
}

template <class T>
void store_shared(Shared to, T value, Source source = Source::current()) {
  static_assert(kOneAccess<T> && sizeof(T) >= 2);
  std::memcpy(emulator::write_shared(to.address, sizeof(T), source), &value, sizeof(T));
}

template <class T>
T load_global(const T* from, Source source = Source::current()) {
  static_assert(kOneAccess<T>);
  emulator::check_global(from, sizeof(T), source);
  return *from;
}

template <class T>
void store_global(T* to, T value, Source source = Source::current()) {
  static_assert(kOneAccess<T>);
  emulator::check_global(to, sizeof(T), source);
  *to = value;
}

inline void copy_async(Shared to, const void* from, bool valid, Source source = Source::current()) {
  emulator::copy_async(to.address, from, 16, valid, source);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int kPending>
void copy_async_wait() {
  emulator::copy_async_wait(kPending);
}

namespace emulator {

struct MatrixLoad {
  uint16_t row[8];  // what is at this lane's address: lane 8 m + i has that of row i of matrix m
  uint32_t (*registers)[4];
};

// Gives lane 4 g + t the elements (g, 2t) and (g, 2t + 1) of each matrix, or if transposed (2t, g) and (2t + 1, g).
template <bool kTransposed>
void exchange_matrices(void* const* lanes, size_t) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int i) -> uint32_t {
        const int row = kTransposed ? 2 * t + i : g, column = kTransposed ? g : 2 * t + i;
        return static_cast<const MatrixLoad*>(lanes[8 * m + row])->row[column];
      };
      (*static_cast<MatrixLoad*>(lanes[lane])->registers)[m] = element(0) | element(1) << 16;
    }
  }
}

template <bool kTransposed>
void load_matrices(uint32_t (&r)[4], Shared row, const Source& source) {
  MatrixLoad mine{{}, &r};
  std::memcpy(mine.row, read_shared(row.address, sizeof(mine.row), source), sizeof(mine.row));
  const auto what = kTransposed ? Collective::kLoadMatricesTransposed : Collective::kLoadMatrices;
  meet(what, source, &mine, exchange_matrices<kTransposed>);
}

}  // namespace emulator

inline void load_matrices(uint32_t (&r)[4], Shared row, Source source = Source::current()) {
  emulator::load_matrices<false>(r, row, source);
}

inline void load_matrices_transposed(uint32_t (&r)[4], Shared row, Source source = Source::current()) {
  emulator::load_matrices<true>(r, row, source);
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

// Lane 4 g + t holds, two to a register: of A the elements (r, c) and (r, c + 1) for (r, c) = (g, 2t), (g + 8,
// 2t), (g, 2t + 8) and (g + 8, 2t + 8); of B the elements (r, g) and (r + 1, g) for r = 2t and 2t + 8; and of C,
// one to a register, (g, 2t), (g, 2t + 1), (g + 8, 2t) and (g + 8, 2t + 1). The order and precision of the sums
// of a GPU are not specified. The emulator sums in fp64, first c, then k = 0 to 15, and rounds to fp32 once.
template <class T>
void mma(void* const* lanes, size_t) {
  const auto value = [](uint32_t two, int half) {
    return double{to_float(T{static_cast<uint16_t>(two >> 16 * half)})};
  };
  double a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* product = static_cast<const Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value((*product->a)[i], half);
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + half][g] = value((*product->b)[i], half);
      for (int i = 0; i < 2; ++i) c[g + i * 8][2 * t + half] = double{(*product->c)[2 * i + half]};
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float(&result)[4] = *static_cast<const Product*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) result[i] = static_cast<float>(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

}  // namespace emulator

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Source source = Source::current()) {
  emulator::Product mine{&c, &a, &b};
  emulator::meet(emulator::Collective::kMma, source, &mine, emulator::mma<T>);
}

// exp2 and log2 of a GPU take subnormal arguments for 0 and return 0 for subnormal results.
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float exp2(float x) { return flushed(std::exp2(flushed(x))); }
inline float log2(float x) { return flushed(std::log2(flushed(x))); }
inline float multiply_rounded(float a, float b) {
  const volatile float product = a * b;  // volatile, so that it is not contracted with a sum
  return product;
}
inline float add_rounded(float a, float b) { return a + b; }
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

inline void require(bool condition, const char* message, Source source = Source::current()) {
  if (!condition) emulator::fail(message, source);
}

// The number is small, so that small problems are divided into parts too.
inline int multiprocessors() { return 8; }

template <class Kernel>
void launch(Index3 grid, uint32_t shared_bytes, Stream, const typename Kernel::Arguments& arguments) {
  static_assert(std::is_trivially_copyable_v<typename Kernel::Arguments> && Kernel::kThreads % 32 == 0);
  emulator::launch(typeid(Kernel).name(), grid, Kernel::kThreads, shared_bytes, [&] { Kernel::run(arguments); });
}

}  // namespace empcause::cuda
