// C[M, lanes] = or += A[M, K] B[K, lanes] in registers. A is read element by element with any two strides (so its transpose
// costs nothing), B and C along rows of whole vectors.
// Include inside the namespace of an instruction set only.

// Accumulators that the registers hold beside a row of B and a factor of A.
#if defined(__AVX512F__)
constexpr int kAccumulators = 24;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16
#endif

template <int kRows, int kVecs, bool kAccumulate>
inline void matmul_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                        float* c, int64_t c_row) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) acc[r][v] = kAccumulate ? load(c + r * c_row + v * kWidth) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + k * b_row + v * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(a[r * a_row + k * a_col]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) store(c + r * c_row + v * kWidth, acc[r][v]);
  }
}

// As many rows at once as the accumulators allow, then half as many, and so on.
template <int kRows, int kVecs, bool kAccumulate>
inline void matmul_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                        int64_t b_row, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    matmul_tile<kRows, kVecs, kAccumulate>(depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
  if constexpr (kRows > 1) {
    matmul_rows<kRows / 2, kVecs, kAccumulate>(rows - m, depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
}

// `vecs` vectors of columns, from 1 on.
template <bool kAccumulate>
inline void matmul(int64_t rows, int64_t vecs, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                   const float* b, int64_t b_row, float* c, int64_t c_row) {
  for (; vecs >= 3; vecs -= 3, b += 3 * kWidth, c += 3 * kWidth) {
    matmul_rows<kAccumulators / 3, 3, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
  }
  if (vecs == 2) matmul_rows<kAccumulators / 2, 2, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
  if (vecs == 1) matmul_rows<kAccumulators, 1, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
}
