// What a product multiplies, 32 bits at a time: a value in fp32, or a pair of values in bf16 that are neighbours along the
// dimension summed over, where the instruction set multiplies and adds such pairs (AVX512-BF16).
#pragma once

#include <type_traits>

#include "../attention.h"
#include "simd.h"

namespace empcause::cpu::EMPCAUSE_ISA {

#if defined(__AVX512BF16__) || defined(EMPCAUSE_BF16_STAND_IN)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

enum class Pair : uint32_t {};  // the first value in the low half

typedef uint32_t UnalignedPairs __attribute__((vector_size(kWidth * 4), aligned(2), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(kWidth * 2)));
typedef int16_t UnalignedSignedVec __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));
typedef uint16_t UnalignedShortVec __attribute__((vector_size(kWidth * 2), aligned(2), may_alias));

template <class T>
constexpr int64_t kValues = std::is_same_v<T, Pair> ? 2 : 1;  // in an operand

// So many operands hold a number of values.
template <class T>
inline int64_t operands(int64_t values) {
  return (values + kValues<T> - 1) / kValues<T>;
}

// Calls function.template operator()<T>() with the operands T that tensors of a dtype are multiplied as.
template <class Function>
inline void with_operands(DType dtype, Function function) {
  if constexpr (kHasPairs) {
    if (dtype == DType::kBFloat16) return function.template operator()<Pair>();
  }
  function.template operator()<float>();
}

inline UnsignedVec load(const Pair* p) { return *reinterpret_cast<const UnalignedPairs*>(p); }
inline void store(Pair* p, UnsignedVec v) { *reinterpret_cast<UnalignedPairs*>(p) = v; }
inline void store(Pair* p, Vec bits) { store(p, reinterpret_cast<UnsignedVec>(bits)); }
inline UnsignedVec splat(Pair x) { return UnsignedVec{} + static_cast<uint32_t>(x); }

inline Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }

inline Vec multiply_add(UnsignedVec a, UnsignedVec b, Vec sum) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
#else
  const auto low = [](UnsignedVec pairs) { return reinterpret_cast<Vec>(pairs << 16); };
  const auto high = [](UnsignedVec pairs) { return reinterpret_cast<Vec>(pairs & 0xffff0000u); };
  return sum + high(a) * high(b) + low(a) * low(b);
#endif
}

// Rounded to the nearest bf16, ties to even; NaN stays one. In the low half of each lane.
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

inline UnsignedVec to_pairs(Vec first, Vec second) {
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

// Operands of a sum over rows: value(i) are some neighbouring values of row i < rows; those of a row that completes a pair are 0.
template <class T, class Value>
[[gnu::always_inline]] inline void store_over_rows(int64_t rows, Value value, T* out, int64_t stride) {
  for (int64_t i = 0; i < rows; i += kValues<T>) {
    const Vec first = value(i);
    if constexpr (kValues<T> == 1) {
      store(out + i * stride, first);
    } else {
      store(out + i / 2 * stride, to_pairs(first, i + 1 < rows ? value(i + 1) : Vec{}));
    }
  }
}

// Operands of a sum along a row: its values d, ..., d + kWidth - 1.
inline void store_along_row(float* row, int64_t d, Vec values) { store(row + d, values); }
inline void store_along_row(Pair* row, int64_t d, Vec values) {
  *reinterpret_cast<UnalignedShortVec*>(reinterpret_cast<uint16_t*>(row) + d) = to_bfloat16(values);
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
