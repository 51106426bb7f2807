// Matrix products C = A B or C += A B, with accumulators in registers; A is [M, K], B [K, lanes] and
// C [M, lanes]. A is read one operand at a time with any two strides, so its transpose costs nothing;
// B and C consist of rows of whole vectors; K counts operands. A product is summed by itself before it is
// added to C, so that rounding errors of long sums grow with the number of products, not of terms.
#pragma once

#include "convert.h"

namespace empcause::cpu::EMPCAUSE_ISA {

// Rows of A that are multiplied at once by three or two vectors of columns. The 3 * kMatmulRows
// accumulators hide the latency of a multiply-add and leave registers for a row of B and an operand of A.
#if defined(__AVX512F__)
constexpr int kMatmulRows = 8;  // there are 32 vector registers
#else
constexpr int kMatmulRows = 4;  // there are 16
#endif
constexpr int kAccumulators = 3 * kMatmulRows;

// Unrolls loops over accumulators before the compiler assigns registers, so that accumulators never live in memory.
#define EMPCAUSE_UNROLLED _Pragma("GCC unroll 24")

// The depth K of a product, as one of three types: Equal, InRuns or Rising. depth[v] is the number of
// operands to sum for the v-th vector of columns; depth.from(v) is the depth of the columns from there on.

// The depth is the same for all columns.
struct Equal {
  int64_t count;
  static constexpr bool kRises = false;

  int64_t operator[](int64_t) const { return count; }
  Equal from(int64_t) const { return *this; }
};

// The depth is the same for all columns and is cut into at least two runs of at most 32 operands. The
// sums of the runs are added up, which accumulates fewer rounding errors than one long sum. Both
// passes compute logits in this way and get the same bits.
struct InRuns : Equal {
  static int64_t run(int64_t operands) { return operands < 64 ? (operands + 1) / 2 : 32; }

  InRuns from(int64_t) const { return *this; }
};

// The depth is a number of values for each vector of columns; it never falls from one vector to the next.
template <class T>
struct Rising {
  const int64_t* values;
  static constexpr bool kRises = true;

  int64_t operator[](int64_t vec) const { return operands<T>(values[vec]); }
  Rising from(int64_t vec) const { return {values + vec}; }
};

// Adds the products k, k + 1, ... up to the depth of vector kFirst to the accumulators of the vectors
// from kFirst on. If the depth rises, goes on with the products that only later vectors have.
template <int kFirst, int kRows, int kVecs, class Depth, class T>
[[gnu::always_inline]] inline void accumulate(Vec (&acc)[kRows][kVecs], int64_t k, Depth depth, const T* a,
                                              int64_t a_row, int64_t a_col, const T* b, int64_t b_row) {
  const int64_t end = depth[kFirst];
  _Pragma("GCC unroll 4") for (; k < end; ++k) {
    decltype(load(b)) row[kVecs];
    EMPCAUSE_UNROLLED for (int v = kFirst; v < kVecs; ++v) row[v] = load(b + k * b_row + v * kWidth);
    EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
      const auto factor = splat(a[r * a_row + k * a_col]);
      EMPCAUSE_UNROLLED for (int v = kFirst; v < kVecs; ++v) acc[r][v] = multiply_add(factor, row[v], acc[r][v]);
    }
  }
  if constexpr (Depth::kRises && kFirst + 1 < kVecs) accumulate<kFirst + 1>(acc, k, depth, a, a_row, a_col, b, b_row);
}

// The epilogue of a product, a functor that takes a tile of accumulators to C while it is in registers.
// from(v) and at(r) return the epilogue of the columns from vector v on and of the rows from r on.

// C = the product.
struct Overwrite {
  template <int kRows, int kVecs>
  [[gnu::always_inline]] void operator()(const Vec (&acc)[kRows][kVecs], float* c, int64_t c_row) const {
    EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
      EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) store(c + r * c_row + v * kWidth, acc[r][v]);
    }
  }
  Overwrite from(int64_t) const { return *this; }
  Overwrite at(int64_t) const { return *this; }
};

// C += the product.
struct Add {
  template <int kRows, int kVecs>
  [[gnu::always_inline]] void operator()(const Vec (&acc)[kRows][kVecs], float* c, int64_t c_row) const {
    EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
      EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) {
        float* at = c + r * c_row + v * kWidth;
        store(at, load(at) + acc[r][v]);
      }
    }
  }
  Add from(int64_t) const { return *this; }
  Add at(int64_t) const { return *this; }
};

// Returns the logit in base 2 of a product query . key; `scale` includes log2(e), and `power` is the
// exponent of a large weight. Both passes use this formula.
inline Vec logit(Vec product, Vec scale, float power) { return product * scale + splat(power); }

// C = the logits of the product. Also updates the largest logit of each column.
struct LogitsAndLargest {
  Vec scale;
  const float* power;  // [rows]
  Vec* largest;        // for each vector of columns

  template <int kRows, int kVecs>
  [[gnu::always_inline]] void operator()(const Vec (&acc)[kRows][kVecs], float* c, int64_t c_row) const {
    EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) {
      Vec most = largest[v];
      EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
        const Vec x = logit(acc[r][v], scale, power[r]);
        store(c + r * c_row + v * kWidth, x);
        most = maximum(x, most);
      }
      largest[v] = most;
    }
  }
  LogitsAndLargest from(int64_t vec) const { return {scale, power, largest + vec}; }
  LogitsAndLargest at(int64_t row) const { return {scale, power + row, largest}; }
};

// One tile of C: kRows rows by kVecs vectors of columns.
template <int kRows, int kVecs, class Depth, class Then, class T>
[[gnu::always_inline]] inline void matmul_tile(Depth depth, Then then, const T* a, int64_t a_row, int64_t a_col,
                                               const T* b, int64_t b_row, float* c, int64_t c_row) {
  Vec acc[kRows][kVecs];
  const auto clear = [&] {
    EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
      EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec{};
    }
  };
  clear();
  if constexpr (std::is_same_v<Depth, InRuns>) {
    const int64_t run = depth.run(depth.count);
    for (int64_t k = 0; k < depth.count; k += run) {
      if (k > 0) Overwrite{}(acc, c, c_row);
      if (k > 0) clear();
      accumulate<0>(acc, k, Equal{k + run < depth.count ? k + run : depth.count}, a, a_row, a_col, b, b_row);
      if (k == 0) continue;
      EMPCAUSE_UNROLLED for (int r = 0; r < kRows; ++r) {
        EMPCAUSE_UNROLLED for (int v = 0; v < kVecs; ++v) acc[r][v] += load(c + r * c_row + v * kWidth);
      }
    }
  } else {
    accumulate<0>(acc, 0, depth, a, a_row, a_col, b, b_row);
  }
  then(acc, c, c_row);
}

// The product for kVecs vectors of columns: kRows rows at a time, then the rest with half as many, and
// so on. Each tile prefetches a few rows.
template <int kRows, int kVecs, class Depth, class Then, class T>
inline void matmul_rows(int64_t rows, Depth depth, Then then, const T* a, int64_t a_row, int64_t a_col, const T* b,
                        int64_t b_row, float* c, int64_t c_row, PrefetchQueue& prefetches) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) {
    prefetches.issue();
    matmul_tile<kRows, kVecs>(depth, then.at(m), a + m * a_row, a_row, a_col, b, b_row, c + m * c_row, c_row);
  }
  if constexpr (kRows > 1) {
    if (m == rows) return;
    matmul_rows<kRows / 2, kVecs>(rows - m, depth, then.at(m), a + m * a_row, a_row, a_col, b, b_row, c + m * c_row,
                                  c_row, prefetches);
  }
}

// The product for `vecs` >= 1 vectors of columns, with the epilogue `then`. a_row, a_col, b_row and c_row are strides.
template <class Depth, class Then, class T>
inline void matmul(int64_t rows, int64_t vecs, Depth depth, Then then, const T* a, int64_t a_row, int64_t a_col,
                   const T* b, int64_t b_row, float* c, int64_t c_row, PrefetchQueue& prefetches) {
  for (; vecs == 3 || vecs > 4;
       vecs -= 3, b += 3 * kWidth, c += 3 * kWidth, depth = depth.from(3), then = then.from(3)) {
    matmul_rows<kMatmulRows, 3>(rows, depth, then, a, a_row, a_col, b, b_row, c, c_row, prefetches);
  }
  for (; vecs > 1; vecs -= 2, b += 2 * kWidth, c += 2 * kWidth, depth = depth.from(2), then = then.from(2)) {
    matmul_rows<kMatmulRows, 2>(rows, depth, then, a, a_row, a_col, b, b_row, c, c_row, prefetches);
  }
  if (vecs == 1) matmul_rows<2 * kMatmulRows, 1>(rows, depth, then, a, a_row, a_col, b, b_row, c, c_row, prefetches);
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
