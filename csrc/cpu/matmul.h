// C[M, lanes] = or += A[M, K] B[K, lanes] in registers. A is read element by element with any two strides (so its transpose
// costs nothing), B and C along rows of whole vectors.
// Include inside the namespace of an instruction set only.

// Rows of A at once beside three or two vectors of columns: so many accumulators hide the latency of a multiply-add, and leave
// registers for a row of B and a factor of A.
#if defined(__AVX512F__)
constexpr int kMatmulRows = 8;  // of 32 registers
#else
constexpr int kMatmulRows = 4;  // of 16
#endif
constexpr int kAccumulators = 3 * kMatmulRows;

// Loops over accumulators are unrolled early, so that these never live in memory.
#define EMPCAUSE_UNROLLED _Pragma("GCC unroll 24")

template <int kRows, int kVecs, bool kAccumulate>
inline void matmul_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                        float* c, int64_t c_row) {
  Vec acc[kRows][kVecs];
  EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) acc[r][v] = kAccumulate ? load(c + r * c_row + v * kWidth) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVecs];
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) row[v] = load(b + k * b_row + v * kWidth);
    EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(a[r * a_row + k * a_col]);
      EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) acc[r][v] += factor * row[v];
    }
  }
  EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) store(c + r * c_row + v * kWidth, acc[r][v]);
  }
}

// kRows at once, then half as many, and so on.
template <int kRows, int kVecs, bool kAccumulate>
inline void matmul_rows(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                        int64_t b_row, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    matmul_tile<kRows, kVecs, kAccumulate>(depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
  if constexpr (kRows > 1) {
    if (m == rows) return;
    matmul_rows<kRows / 2, kVecs, kAccumulate>(rows - m, depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
}

// `vecs` vectors of columns, from 1 on.
template <bool kAccumulate>
inline void matmul(int64_t rows, int64_t vecs, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                   const float* b, int64_t b_row, float* c, int64_t c_row) {
  for (; vecs == 3 || vecs > 4; vecs -= 3, b += 3 * kWidth, c += 3 * kWidth) {
    matmul_rows<kMatmulRows, 3, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
  }
  for (; vecs > 1; vecs -= 2, b += 2 * kWidth, c += 2 * kWidth) {
    matmul_rows<kMatmulRows, 2, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
  }
  if (vecs == 1) matmul_rows<2 * kMatmulRows, 1, kAccumulate>(rows, depth, a, a_row, a_col, b, b_row, c, c_row);
}
