// The measuring loops of one instruction set (limits.h).
#include "limits.h"

#include "isa.h"
#include "matmul.h"

namespace empcause::cpu {

namespace EMPCAUSE_ISA {

inline int64_t multiply_adds(DType dtype, int64_t rounds) {
  int64_t flops = 0;
  with_operands(dtype, [&]<class T>() {
    // Volatile, so that the compiler knows neither the value nor that two reads give the same one.
    const volatile uint32_t some = 0x3f803f80u;
    const auto factor = [&] { return splat(__builtin_bit_cast(T, uint32_t{some})); };
    const auto a = factor(), b = factor();
    Vec acc[kAccumulators];
    EMPCAUSE_UNROLLED for (Vec& chain : acc) chain = reinterpret_cast<Vec>(factor());
    for (int64_t round = 0; round < rounds; ++round) {
      EMPCAUSE_UNROLLED for (int i = 0; i < kAccumulators; ++i) {
        if constexpr (kValues<T> == 1) acc[i] = multiply_add(a, acc[i], b);
        if constexpr (kValues<T> == 2) acc[i] = multiply_add(a, b, acc[i]);
      }
    }
    volatile float result = 0.0f;
    EMPCAUSE_UNROLLED for (int i = 0; i < kAccumulators; ++i) result = result + sum(acc[i]);
    flops = 2 * kValues<T> * rounds * kAccumulators * kWidth;
  });
  return flops;
}

inline float read_all(const float* data, int64_t count) {
  constexpr int64_t kVecs = 4, kStep = kVecs * kWidth;
  const int64_t half = count / (2 * kStep) * kStep;
  Vec first[kVecs]{}, second[kVecs]{};
  for (int64_t i = 0; i < half; i += kStep) {
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) {
      first[v] += load(data + i + v * kWidth);
      second[v] += load(data + half + i + v * kWidth);
    }
  }
  float total = 0.0f;
  for (int v = 0; v < kVecs; ++v) total += sum(first[v] + second[v]);
  for (int64_t i = 2 * half; i < count; ++i) total += data[i];
  return total;
}

}  // namespace EMPCAUSE_ISA

const Limits EMPCAUSE_NAME_OF_ISA(limits_) = {EMPCAUSE_ISA::multiply_adds, EMPCAUSE_ISA::read_all};

}  // namespace empcause::cpu
