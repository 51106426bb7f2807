// Operands: the 32-bit elements that matrix products multiply. An operand is one fp32 value, or, where the instruction
// set has a product for them (AVX512-BF16), two bf16 values that are neighbours along the dimension summed over.
#pragma once

#include <type_traits>

#include "../attention.h"
#include "simd.h"

namespace empcause::cpu::EMPCAUSE_ISA {

#if defined(__AVX512BF16__) || defined(EMPCAUSE_BF16_STAND_IN)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

enum class BFloat16x2 : uint32_t {};  // the first value is in the low half

typedef uint32_t UnalignedBFloat16x2Vec __attribute__((vector_size(kWidth * 4), aligned(2), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(kWidth * 2)));
typedef int16_t UnalignedSignedVec __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
typedef uint16_t UnalignedShortVec __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

// How many values an operand holds.
template <class T>
constexpr int64_t kValues = std::is_same_v<T, BFloat16x2> ? 2 : 1;

// Returns how many operands hold `values` values.
template <class T>
inline int64_t operands(int64_t values) {
  return (values + kValues<T> - 1) / kValues<T>;
}

// Calls function.template operator()<T>() with the type T of operands that tensors of a dtype are multiplied as.
template <class Function>
inline void with_operands(DType dtype, Function function) {
  if constexpr (kMultipliesBFloat16) {
    if (dtype == DType::kBFloat16) return function.template operator()<BFloat16x2>();
  }
  function.template operator()<float>();
}

inline UnsignedVec load(const BFloat16x2* p) { return *reinterpret_cast<const UnalignedBFloat16x2Vec*>(p); }
inline void store(BFloat16x2* p, UnsignedVec v) { *reinterpret_cast<UnalignedBFloat16x2Vec*>(p) = v; }
inline void store(BFloat16x2* p, Vec bits) { store(p, reinterpret_cast<UnsignedVec>(bits)); }
inline UnsignedVec splat(BFloat16x2 x) { return UnsignedVec{} + static_cast<uint32_t>(x); }

inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }

inline Vec multiply_add(UnsignedVec a, UnsignedVec b, Vec sum) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const auto low = [](UnsignedVec bits) { return reinterpret_cast<Vec>(bits << 16); };
  const auto high = [](UnsignedVec bits) { return reinterpret_cast<Vec>(bits & 0xffff0000u); };
  return sum + high(a) * high(b) + low(a) * low(b);
#endif
}

// Returns the bits of values rounded to bf16 (to nearest, ties to even; NaN stays NaN) in the low half of each lane.
inline UnsignedVec bfloat16_bits(Vec values) {
  const UnsignedVec bits = reinterpret_cast<UnsignedVec>(values);
  const UnsignedVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  return values == values ? rounded : nan;
}

inline ShortVec to_bfloat16(Vec values) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<ShortVec>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(values)));
#else
  return __builtin_convertvector(bfloat16_bits(values), ShortVec);
#endif
}

// Returns operands with `first` in the low and `second` in the high halves, rounded to bf16.
inline UnsignedVec to_bfloat16x2(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(kWidth * 4)));
  Halves places;  // `first` fills the lower half of the vector, `second` the upper one
  for (int i = 0; i < kWidth; ++i) {
    places[2 * i] = static_cast<uint16_t>(i);
    places[2 * i + 1] = static_cast<uint16_t>(kWidth + i);
  }
  const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
  return reinterpret_cast<UnsignedVec>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(places), reinterpret_cast<__m512i>(both)));
#else
  return bfloat16_bits(first) | (bfloat16_bits(second) << 16);
#endif
}

// Stores kWidth columns of operands of a sum over rows: value(i) returns the values of row i in these
// columns. If an operand holds two rows and their number is odd, zeros stand for the missing row.
template <class T, class Value>
[[gnu::always_inline]] inline void store_over_rows(int64_t rows, Value value, T* out, int64_t stride) {
  for (int64_t i = 0; i < rows; i += kValues<T>) {
    const Vec first = value(i);
    if constexpr (kValues<T> == 1) {
      store(out + i * stride, first);
    } else {
      store(out + i / 2 * stride, to_bfloat16x2(first, i + 1 < rows ? value(i + 1) : Vec{}));
    }
  }
}

// Stores values d, ..., d + kWidth - 1 of a row as operands of a sum along the row.
inline void store_along_row(float* row, int64_t d, Vec values) { store(row + d, values); }
inline void store_along_row(BFloat16x2* row, int64_t d, Vec values) {
  *reinterpret_cast<UnalignedShortVec*>(reinterpret_cast<uint16_t*>(row) + d) = to_bfloat16(values);
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
