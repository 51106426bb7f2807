// C[M, N] (+)= A[M, K] B[K, N] in registers. A is read element by element with any two strides (so its transpose costs
// nothing), B and C along rows; N is a multiple of the vector width.
// Include inside the namespace of an instruction set only.

#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileVecs = 4;  // 24 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kTileRows = 6, kTileVecs = 2;  // 12 of 16
#else
constexpr int kTileRows = 4, kTileVecs = 2;  // 8 of 16
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

template <int kRows, bool kAccumulate>
inline void matmul_rows(int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                        int64_t b_row, float* c, int64_t c_row) {
  int64_t n = 0;
  for (; n + kTileVecs * kWidth <= columns; n += kTileVecs * kWidth) {
    matmul_tile<kRows, kTileVecs, kAccumulate>(depth, a, a_row, a_col, b + n, b_row, c + n, c_row);
  }
  for (; n < columns; n += kWidth) {
    matmul_tile<kRows, 1, kAccumulate>(depth, a, a_row, a_col, b + n, b_row, c + n, c_row);
  }
}

template <bool kAccumulate>
inline void matmul(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_col,
                   const float* b, int64_t b_row, float* c, int64_t c_row) {
  int64_t m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) {
    matmul_rows<kTileRows, kAccumulate>(columns, depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
  for (; m < rows; ++m) {
    matmul_rows<1, kAccumulate>(columns, depth, a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
}
