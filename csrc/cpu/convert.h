// Conversions between rows of tensors in fp32, bf16 or fp16 and scratch memory, where they are
// operands of products or sums in fp32, zero-padded to whole vectors; and prefetching of rows.
#pragma once

#include "operands.h"

namespace empcause::cpu::EMPCAUSE_ISA {

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                  // to nearest even
}

// Returns kWidth neighbouring values of a tensor as fp32.
template <DType kType>
inline Vec load_values(const void* data, int64_t index) {
  if constexpr (kType == DType::kFloat32) {
    return load(static_cast<const float*>(data) + index);
  } else if constexpr (kType == DType::kBFloat16) {
    const ShortVec bits = *reinterpret_cast<const UnalignedShortVec*>(static_cast<const uint16_t*>(data) + index);
    return reinterpret_cast<Vec>(__builtin_convertvector(bits, IntVec) << 16);
  } else {
    Vec values;
    for (int i = 0; i < kWidth; ++i) values[i] = static_cast<float>(static_cast<const _Float16*>(data)[index + i]);
    return values;
  }
}

template <DType kType>
inline float load_value(const void* data, int64_t index) {
  if constexpr (kType == DType::kFloat32) return static_cast<const float*>(data)[index];
  if constexpr (kType == DType::kBFloat16) {
    return bits_to_float(uint32_t{static_cast<const uint16_t*>(data)[index]} << 16);
  }
  if constexpr (kType == DType::kFloat16) return static_cast<float>(static_cast<const _Float16*>(data)[index]);
}

template <DType kType>
inline void store_value(void* data, int64_t index, float value) {
  if constexpr (kType == DType::kFloat32) static_cast<float*>(data)[index] = value;
  if constexpr (kType == DType::kBFloat16) static_cast<uint16_t*>(data)[index] = float_to_bfloat16(value);
  if constexpr (kType == DType::kFloat16) static_cast<_Float16*>(data)[index] = static_cast<_Float16>(value);
}

// Calls function.template operator()<dtype>(). For operands of two values the dtype can only be bf16.
template <class T = float, class Function>
inline void with_dtype(DType dtype, Function function) {
  if constexpr (kValues<T> == 2) {
    function.template operator()<DType::kBFloat16>();
  } else {
    switch (dtype) {
      case DType::kFloat32: return function.template operator()<DType::kFloat32>();
      case DType::kBFloat16: return function.template operator()<DType::kBFloat16>();
      case DType::kFloat16: return function.template operator()<DType::kFloat16>();
    }
  }
}

// Returns the first min(count, kWidth) values from `index` on as fp32, followed by zeros.
template <DType kType>
inline Vec load_values(const void* data, int64_t index, int64_t count) {
  if (count >= kWidth) return load_values<kType>(data, index);
  Vec values{};
  for (int i = 0; i < count; ++i) values[i] = load_value<kType>(data, index + i);
  return values;
}

// Returns kWidth neighbouring operands of a sum along a row: its first `count` values from `index` on,
// followed by zeros.
template <class T, DType kType>
inline Vec load_operands(const void* data, int64_t index, int64_t count) {
  if constexpr (kValues<T> == 1) {
    return load_values<kType>(data, index, count);
  } else {
    const uint16_t* row = static_cast<const uint16_t*>(data) + index;
    UnsignedVec bits{};
    if (count >= 2 * kWidth) return reinterpret_cast<Vec>(bits | *reinterpret_cast<const UnalignedBFloat16x2Vec*>(row));
    for (int i = 0; 2 * i < count; ++i) {
      bits[i] = row[2 * i] | (2 * i + 1 < count ? uint32_t{row[2 * i + 1]} << 16 : 0u);
    }
    return reinterpret_cast<Vec>(bits);
  }
}

// Stores the first min(count, kWidth) lanes, rounded to the dtype.
template <DType kType>
inline void store_values(void* data, int64_t index, int64_t count, Vec values) {
  if (kType == DType::kFloat32 && count >= kWidth) return store(static_cast<float*>(data) + index, values);
  if (kType == DType::kBFloat16 && count >= kWidth) {
    *reinterpret_cast<UnalignedShortVec*>(static_cast<uint16_t*>(data) + index) = to_bfloat16(values);
    return;
  }
  for (int i = 0; i < kWidth && i < count; ++i) store_value<kType>(data, index + i, values[i]);
}

// Stores what rounding to bf16 or fp16 takes from values, in units of fp32's last place. It fits 16
// bits unless a value is subnormal in fp16; there it saturates.
template <DType kType>
inline void store_rounding(int16_t* at, int64_t count, Vec values) {
  Vec rounded;
  if constexpr (kType == DType::kBFloat16) {
    rounded = reinterpret_cast<Vec>(bfloat16_bits(values) << 16);
  } else {
    for (int i = 0; i < kWidth; ++i) rounded[i] = static_cast<float>(static_cast<_Float16>(values[i]));
  }
  IntVec units = reinterpret_cast<IntVec>(values) - reinterpret_cast<IntVec>(rounded);
  units = units > 32767 ? IntVec{} + 32767 : units;
  units = units < -32768 ? IntVec{} - 32768 : units;
  const ShortVec bits = __builtin_convertvector(units, ShortVec);
  if (count >= kWidth) {
    *reinterpret_cast<UnalignedShortVec*>(at) = bits;
    return;
  }
  for (int i = 0; i < count; ++i) at[i] = static_cast<int16_t>(bits[i]);
}

// Undoes the rounding of values that were stored with store_rounding; returns them unchanged if `rounding` is null.
template <DType kType>
inline Vec unrounded(Vec values, const void* rounding, int64_t index, int64_t count) {
  if (kType == DType::kFloat32 || rounding == nullptr) return values;
  const int16_t* at = static_cast<const int16_t*>(rounding) + index;
  IntVec units{};
  if (count >= kWidth) {
    units = __builtin_convertvector(*reinterpret_cast<const UnalignedSignedVec*>(at), IntVec);
  } else {
    for (int i = 0; i < count; ++i) units[i] = at[i];
  }
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(values) + units);
}

// Stores the values and, if `rounding` is not null, what rounding took from them.
template <DType kType>
inline void store_values(void* data, int64_t index, int64_t count, Vec values, void* rounding, int64_t rounding_index) {
  store_values<kType>(data, index, count, values);
  if constexpr (kType != DType::kFloat32) {
    if (rounding != nullptr) store_rounding<kType>(static_cast<int16_t*>(rounding) + rounding_index, count, values);
  }
}

// How many rows ahead of its use a row is prefetched. Rows of a strided tensor are far from each
// other, so the hardware does not foresee which come next.
constexpr int64_t kAhead = 8;

// Prefetches the `size` values of a row.
inline void prefetch_row(const Matrices& m, DType dtype, int64_t offset, int64_t size) {
  constexpr int64_t kCacheLine = 64;
  const int64_t value_size = dtype == DType::kFloat32 ? 4 : 2;
  const char* row = static_cast<const char*>(m.data) + offset * value_size;
  for (int64_t byte = 0; byte < size * value_size; byte += kCacheLine) __builtin_prefetch(row + byte);
}

// The rows that the thread reads or writes next. Matrix products prefetch them a few at a time.
class PrefetchQueue {
 public:
  explicit PrefetchQueue(const Attention& a) : dtype_(a.dtype), head_dim_(a.head_dim) {}

  // Adds `rows` rows of a tensor from `row` on. `m` must outlive this object.
  void add(const Matrices& m, int64_t batch, int64_t head, int64_t row, int64_t rows) {
    constexpr int64_t kMostValues = 1 << 14;  // later rows would be displaced from the cache before they are used
    const int64_t most = kMostValues / head_dim_;
    if (rows > 0) ranges_[count_++] = {&m, batch * m.batch + head * m.head + row * m.row, rows < most ? rows : most};
  }

  // Prefetches the next few rows.
  void issue() {
    constexpr int kRowsAtOnce = kWidth / 4;  // the wider the tiles of a product, the fewer there are, and so the calls
    for (int i = 0; i < kRowsAtOnce && next_ < count_; ++i) {
      Range& range = ranges_[next_];
      prefetch_row(*range.m, dtype_, range.offset, head_dim_);
      range.offset += range.m->row;
      if (--range.rows == 0) ++next_;
    }
  }

 private:
  struct Range {
    const Matrices* m;
    int64_t offset, rows;
  };

  DType dtype_;
  int64_t head_dim_;
  Range ranges_[8];
  int count_ = 0, next_ = 0;
};

// Loads a row of `size` values into `out` as operands of a sum along the row, followed by zeros up to whole vectors.
template <class T>
inline void load_row(const Matrices& m, DType dtype, int64_t offset, int64_t size, T* out) {
  with_dtype<T>(dtype, [&]<DType kType>() {
    for (int64_t d = 0; d < size; d += kValues<T> * kWidth) {
      store(out + d / kValues<T>, load_operands<T, kType>(m.data, offset + d, size - d));
    }
  });
}

// Stores a row of `size` values, times `factor`, and what rounding takes from them into `rounding` if that has data.
inline void store_row(const Matrices& m, DType dtype, int64_t offset, int64_t size, float factor, const float* in,
                      const Matrices& rounding = {}, int64_t rounding_offset = 0) {
  with_dtype(dtype, [&]<DType kType>() {
    for (int64_t d = 0; d < size; d += kWidth) {
      store_values<kType>(m.data, offset + d, size - d, load(in + d) * splat(factor), rounding.data,
                          rounding_offset + d);
    }
  });
}

// Packs rows of a tensor as columns of operands: out[i * columns + r] is operand i of row r. Columns
// from `rows` to `columns`, which is a multiple of kWidth, are zero.
template <class T>
inline void pack_transposed(const Matrices& m, DType dtype, int64_t offset, int64_t rows, int64_t columns,
                            int64_t head_dim, T* out) {
  with_dtype<T>(dtype, [&]<DType kType>() {
    constexpr int64_t kStep = kValues<T> * kWidth;
    for (int64_t first = 0; first < columns; first += kWidth) {
      for (int r = 0; r < kWidth; ++r) prefetch_row(m, dtype, offset + (first + kWidth + r) * m.row, head_dim);
      for (int64_t d = 0; d < head_dim; d += kStep) {
        const int64_t index = offset + first * m.row + d, left = head_dim - d;
        const bool whole = first + kWidth <= rows && left >= kStep;
        Vec square[kWidth];
        if (whole) {
          for (int r = 0; r < kWidth; ++r) square[r] = load_operands<T, kType>(m.data, index + r * m.row, kStep);
        } else {
          for (int r = 0; r < kWidth; ++r) {
            square[r] = first + r < rows ? load_operands<T, kType>(m.data, index + r * m.row, left) : Vec{};
          }
        }
        transpose(square);
        T* at = out + d / kValues<T> * columns + first;
        if (whole) {
          for (int c = 0; c < kWidth; ++c) store(at + c * columns, square[c]);
        } else {
          for (int c = 0; c < kWidth && c < operands<T>(left); ++c) store(at + c * columns, square[c]);
        }
      }
    }
  });
}

// Transposes rows of operands that are already in scratch memory: out[i * rows + r] is operand i of
// row r. `rows` is a multiple of kWidth.
template <class T>
inline void transpose_rows(const T* in, int64_t rows, int64_t row_operands, T* out) {
  const int64_t stride = round_up(row_operands);
  for (int64_t first = 0; first < rows; first += kWidth) {
    for (int64_t i = 0; i < row_operands; i += kWidth) {
      Vec square[kWidth];
      for (int r = 0; r < kWidth; ++r) square[r] = reinterpret_cast<Vec>(load(in + (first + r) * stride + i));
      transpose(square);
      for (int c = 0; c < kWidth && i + c < row_operands; ++c) store(out + (i + c) * rows + first, square[c]);
    }
  }
}

// Stores columns of sums as rows [0, rows) of a tensor: row r is column r times its factor. factor(r) returns
// those of rows r, ..., r + kWidth - 1. What rounding takes from the values goes to `rounding` if that has data.
template <class Factor>
inline void unpack_transposed(const float* in, int64_t stride, int64_t rows, int64_t head_dim, Factor factor,
                              const Matrices& m, DType dtype, int64_t offset, const Matrices& rounding = {},
                              int64_t rounding_offset = 0) {
  with_dtype(dtype, [&]<DType kType>() {
    for (int64_t first = 0; first < rows; first += kWidth) {
      const Vec factors = factor(first);
      for (int64_t d = 0; d < head_dim; d += kWidth) {
        const float* at = in + d * stride + first;
        const int64_t index = offset + first * m.row + d, columns_left = head_dim - d;
        const int64_t rounding_index = rounding_offset + first * rounding.row + d;
        const bool whole = first + kWidth <= rows && columns_left >= kWidth;
        Vec square[kWidth];
        if (whole) {
          for (int c = 0; c < kWidth; ++c) square[c] = load(at + c * stride) * factors;
        } else {
          for (int c = 0; c < kWidth; ++c) square[c] = c < columns_left ? load(at + c * stride) * factors : Vec{};
        }
        transpose(square);
        const auto store_row_part = [&](int r, int64_t columns) {
          store_values<kType>(m.data, index + r * m.row, columns, square[r], rounding.data,
                              rounding_index + r * rounding.row);
        };
        if (whole) {
          for (int r = 0; r < kWidth; ++r) store_row_part(r, kWidth);
        } else {
          for (int r = 0; r < kWidth && first + r < rows; ++r) store_row_part(r, columns_left);
        }
      }
    }
  });
}

}  // namespace empcause::cpu::EMPCAUSE_ISA
