// Vectors of fp32, as the compiler's vector types: one source serves every instruction set.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "isa.h"

namespace empcause::cpu::EMPCAUSE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef float UnalignedVec __attribute__((vector_size(kWidth * 4), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UnsignedVec __attribute__((vector_size(kWidth * 4)));
typedef uint64_t LongVec __attribute__((vector_size(kWidth * 4)));  // it has kWidth / 2 lanes

constexpr float kInfinity = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

// Returns, for each lane of 64 bits, the 64-bit product of the low 32 bits of a and b.
inline LongVec multiply_low_halves(LongVec a, LongVec b) {
#if defined(__AVX512F__)
  // A masked product with all lanes set: for the unmasked intrinsic GCC 12 warns of a read of uninitialised memory.
  const __m512i x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
  return reinterpret_cast<LongVec>(_mm512_maskz_mul_epu32(static_cast<__mmask8>(0xff), x, y));
#elif defined(__AVX2__)
  return reinterpret_cast<LongVec>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<LongVec>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

inline IntVec lane_index() {
  IntVec index;
  for (int i = 0; i < kWidth; ++i) index[i] = i;
  return index;
}

inline bool all(IntVec v) {
  int32_t every = -1;
  for (int i = 0; i < kWidth; ++i) every &= v[i];
  return every != 0;
}

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

// Bounds of the relative errors of exp2 and log2.
constexpr double kExp2Error = 1.1e-7, kLog2Error = 2.5e-7;

// Returns 2^x for x < 128, relative error below kExp2Error; exactly 0 for x < -126 and so for -infinity; NaN for NaN.
inline Vec exp2(Vec x) {
  // x = n + r with |r| <= 1/2: adding 1.5 * 2^23 rounds to the nearest integer n. The polynomial is the minimax
  // approximation of 2^r on this interval; its own error is 2e-9, and the rest of the stated bound is rounding.
  const Vec shifted = x + splat(12582912.0f);
  const Vec r = x - (shifted - splat(12582912.0f));
  Vec p = splat(1.53533620e-4f);
  p = p * r + splat(1.33988745e-3f);
  p = p * r + splat(9.61843736e-3f);
  p = p * r + splat(5.55033247e-2f);
  p = p * r + splat(2.40226479e-1f);
  p = p * r + splat(6.93147203e-1f);
  p = p * r + splat(1.0f);
  // Multiplies p by 2^n: the low bits of `shifted` are n, which is added to the exponent of p.
  const IntVec exponent = reinterpret_cast<IntVec>(shifted) << 23;
  const Vec power = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + exponent);
  return x < splat(-126.0f) ? Vec{} : power;
}

// Returns log2(x) for x >= 0, relative error below kLog2Error; -infinity for 0, infinity for infinity, NaN for NaN.
inline Vec log2(Vec x) {
  // Subnormal numbers have no exponent of their own, so they are multiplied by 2^24 first.
  const IntVec small = x < splat(1.17549435e-38f);
  const IntVec bits = reinterpret_cast<IntVec>(small ? x * splat(16777216.0f) : x);
  // x = m * 2^n with m in [sqrt(1/2), sqrt(2)); log2(m) is odd in t = (m - 1) / (m + 1), |t| < 0.172.
  const IntVec exponent = (bits - 0x3f3504f3) >> 23;
  const Vec m = reinterpret_cast<Vec>(bits - (exponent << 23));
  const Vec t = (m - splat(1.0f)) / (m + splat(1.0f)), square = t * t;
  Vec p = splat(0.43173300f);
  p = p * square + splat(0.57671450f);
  p = p * square + splat(0.96179885f);
  p = p * square + splat(2.8853900f);
  const Vec n = __builtin_convertvector(small ? exponent - 24 : exponent, Vec);
  const Vec result = x > Vec{} ? p * t + n : splat(-kInfinity);
  return x < splat(kInfinity) ? result : x;
}

// Returns, in each lane, the element `index` of a followed by b.
inline Vec shuffle(Vec a, Vec b, IntVec index) {
#if defined(__clang__)
  Vec result;
  for (int lane = 0; lane < kWidth; ++lane) {
    result[lane] = index[lane] < kWidth ? a[index[lane]] : b[index[lane] - kWidth];
  }
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

struct TwoVecs {
  Vec a, b;
};

// Splits the 2 * kWidth values of a followed by b into those at even and those at odd places.
inline TwoVecs deinterleave(Vec a, Vec b) {
  IntVec even, odd;
  for (int lane = 0; lane < kWidth; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  return {shuffle(a, b, even), shuffle(a, b, odd)};
}

// The inverse of deinterleave: returns a[0], b[0], a[1], b[1], ... in two vectors.
inline TwoVecs interleave(Vec a, Vec b) {
  IntVec low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    low[lane] = lane / 2 + lane % 2 * kWidth;
    high[lane] = kWidth / 2 + low[lane];
  }
  return {shuffle(a, b, low), shuffle(a, b, high)};
}

// Swaps blocks of kStep x kStep values with those on the other side of the diagonal, then larger blocks.
template <int kStep>
inline void transpose_blocks(Vec (&rows)[kWidth]) {
  if constexpr (kStep < kWidth) {
    IntVec low, high;
    for (int lane = 0; lane < kWidth; ++lane) {
      low[lane] = (lane & kStep) == 0 ? lane : kWidth + lane - kStep;
      high[lane] = (lane & kStep) == 0 ? lane + kStep : kWidth + lane;
    }
    for (int i = 0; i < kWidth; ++i) {
      if ((i & kStep) != 0) continue;
      const Vec a = rows[i], b = rows[i + kStep];
      rows[i] = shuffle(a, b, low);
      rows[i + kStep] = shuffle(a, b, high);
    }
    transpose_blocks<2 * kStep>(rows);
  }
}

// Returns the sum of row i in lane i. Each step transposes a level and adds, which halves the number
// of vectors. Overwrites the rows.
template <int kStep = kWidth / 2>
inline Vec sums(Vec* rows) {
  IntVec low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    low[lane] = (lane & kStep) == 0 ? lane : kWidth + lane - kStep;
    high[lane] = (lane & kStep) == 0 ? lane + kStep : kWidth + lane;
  }
  for (int i = 0; i < kStep; ++i) {
    rows[i] = shuffle(rows[i], rows[i + kStep], low) + shuffle(rows[i], rows[i + kStep], high);
  }
  if constexpr (kStep == 1) {
    return rows[0];
  } else {
    return sums<kStep / 2>(rows);
  }
}

// Transposes kWidth x kWidth values in place. Squares of 4 x 4 values come first: their single values
// are interleaved, then halves of four values are joined. Each of these shuffles is one instruction,
// as it stays within the 128-bit parts of a vector.
inline void transpose(Vec (&rows)[kWidth]) {
  IntVec low, high, low_halves, high_halves;
  for (int lane = 0; lane < kWidth; ++lane) {
    const int part = lane / 4 * 4, place = lane % 4, other = place % 2 * kWidth, half = place / 2 * kWidth + place % 2;
    low[lane] = part + place / 2 + other;
    high[lane] = part + place / 2 + 2 + other;
    low_halves[lane] = part + half;
    high_halves[lane] = part + half + 2;
  }
  for (int i = 0; i < kWidth; i += 4) {
    const Vec a = shuffle(rows[i], rows[i + 1], low), b = shuffle(rows[i + 2], rows[i + 3], low);
    const Vec c = shuffle(rows[i], rows[i + 1], high), d = shuffle(rows[i + 2], rows[i + 3], high);
    rows[i] = shuffle(a, b, low_halves);
    rows[i + 1] = shuffle(a, b, high_halves);
    rows[i + 2] = shuffle(c, d, low_halves);
    rows[i + 3] = shuffle(c, d, high_halves);
  }
  transpose_blocks<4>(rows);
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
