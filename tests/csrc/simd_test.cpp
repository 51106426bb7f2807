// Prints the largest relative errors of exp2 and log2 of csrc/cpu/simd.h over their whole range, each before its
// stated bound, and whether special values are right. The exit code is 77 where the processor does not have the instructions.
#include "cpu/simd.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>

namespace {

using namespace empcause::cpu::EMPCAUSE_ISA;

// Returns the largest relative error over every 97th float, from the one with bits `first` on, up to
// the first for which `in_range` does not hold.
template <class Function, class Exact, class InRange>
double largest_error(uint32_t first, Function function, Exact exact, InRange in_range) {
  constexpr uint32_t kStep = 97;
  double largest = 0;
  for (uint64_t bits = first; bits <= 0xffffffffu;) {
    Vec x{};
    int count = 0;
    for (; count < kWidth && bits <= 0xffffffffu; ++count, bits += kStep) {
      const float value = __builtin_bit_cast(float, static_cast<uint32_t>(bits));
      if (!in_range(value)) {
        bits = 0x100000000u;
        break;
      }
      x[count] = value;
    }
    const Vec y = function(x);
    for (int i = 0; i < count; ++i) {
      const double expected = exact(static_cast<double>(x[i]));
      const double error = expected == 0 ? std::abs(double(y[i])) : std::abs(y[i] / expected - 1);
      largest = error <= largest ? largest : std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    }
  }
  return largest;
}

bool special_values_hold() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  const auto exp2_of = [](float x) { return exp2(splat(x))[0]; };
  const auto log2_of = [](float x) { return log2(splat(x))[0]; };
  return exp2_of(0) == 1 && exp2_of(-infinity) == 0 && exp2_of(-126.01f) == 0 && std::isnan(exp2_of(nan)) &&
         log2_of(1) == 0 && log2_of(0) == -infinity && log2_of(infinity) == infinity && std::isnan(log2_of(nan));
}

}  // namespace

int main() {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512dq")) return 77;
#elif defined(__AVX2__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  const auto exp2_of = [](Vec x) { return exp2(x); };
  const auto log2_of = [](Vec x) { return log2(x); };
  const auto exact_exp2 = [](double x) { return std::exp2(x); };
  const auto exact_log2 = [](double x) { return std::log2(x); };
  const double positive = largest_error(0, exp2_of, exact_exp2, [](float x) { return x < 128; });
  const double negative = largest_error(0x80000000u, exp2_of, exact_exp2, [](float x) { return x >= -126; });
  const double logarithm =
      largest_error(1, log2_of, exact_log2, [](float x) { return x <= std::numeric_limits<float>::max(); });
  const double exponential = positive > negative ? positive : negative;
  std::printf("%g %g %g %g %d\n", exponential, kExp2Error, logarithm, kLog2Error, special_values_hold());
}
