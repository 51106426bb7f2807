// What the machine can do at most: the yardsticks that benchmarks hold the kernels against.
// Include inside the namespace of an instruction set only.

// Independent chains of multiply-adds in registers, as many as the matrix products have accumulators; the FLOPs done.
inline int64_t multiply_adds(int64_t rounds) {
  const volatile float one = 1.0f;  // nothing here is known to the compiler
  const Vec factor = splat(one), summand = splat(one);
  Vec acc[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) acc[i] = splat(one);
  for (int64_t round = 0; round < rounds; ++round) {
    for (int i = 0; i < kAccumulators; ++i) acc[i] = acc[i] * factor + summand;
  }
  volatile float result = 0.0f;
  for (int i = 0; i < kAccumulators; ++i) result = result + sum(acc[i]);
  return 2 * rounds * kAccumulators * kWidth;
}

// Reads an array once, as fast as memory gives it; the sum of its values.
inline float read_all(const float* data, int64_t count) {
  constexpr int kChains = 8;
  Vec acc[kChains]{};
  int64_t i = 0;
  for (; i + kChains * kWidth <= count; i += kChains * kWidth) {
    for (int c = 0; c < kChains; ++c) acc[c] += load(data + i + c * kWidth);
  }
  float total = 0.0f;
  for (const Vec& part : acc) total += sum(part);
  for (; i < count; ++i) total += data[i];
  return total;
}
