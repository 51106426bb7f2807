// Vectors of fp32 by the compiler's vector types: one source for every instruction set.
// Include inside the namespace of an instruction set only, so that no inline function is shared between two of them.

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

constexpr float kInfinity = __builtin_inff();

inline Vec splat(float x) { return x - Vec{}; }
inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
inline int64_t round_up(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }

inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}

inline float maximum(Vec v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x for x <= 88, relative error below 2e-7; exactly 0 below -87, so for -infinity.
inline Vec exp(Vec x) {
  const Vec clamped = x < splat(-87.0f) ? splat(-87.0f) : x;  // NaN stays
  // x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts; adding 1.5 * 2^23 rounds to the nearest integer.
  const Vec shifted = clamped * splat(1.44269504f) + splat(12582912.0f);
  const Vec n = shifted - splat(12582912.0f);
  const Vec r = (clamped - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
  const IntVec exponent = (reinterpret_cast<IntVec>(shifted) - 0x4B400000 + 127) << 23;
  return x < splat(-87.0f) ? Vec{} : p * reinterpret_cast<Vec>(exponent);
}
