// Rows of fp32, bf16 and fp16 in and out of fp32 scratch, zero-padded to whole vectors.
// Include inside the namespace of an instruction set only.

inline float bits_to_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays one
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);                   // to nearest even
}

inline void load_row(const Matrices& m, DType dtype, int64_t offset, int64_t size, float factor, float* out) {
  if (dtype == DType::kFloat32) {
    const float* in = static_cast<const float*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = in[d] * factor;
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* in = static_cast<const uint16_t*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = bits_to_float(static_cast<uint32_t>(in[d]) << 16) * factor;
  } else {
    const _Float16* in = static_cast<const _Float16*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = static_cast<float>(in[d]) * factor;
  }
  for (int64_t d = size; d < round_up(size); ++d) out[d] = 0.0f;
}

inline void store_row(const Matrices& m, DType dtype, int64_t offset, int64_t size, float factor, const float* in) {
  if (dtype == DType::kFloat32) {
    float* out = static_cast<float*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = in[d] * factor;
  } else if (dtype == DType::kBFloat16) {
    uint16_t* out = static_cast<uint16_t*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = float_to_bfloat16(in[d] * factor);
  } else {
    _Float16* out = static_cast<_Float16*>(m.data) + offset;
    for (int64_t d = 0; d < size; ++d) out[d] = static_cast<_Float16>(in[d] * factor);
  }
}

// Rows to columns: out[d * stride + r] for rows [0, rows), factor included; columns up to `columns`, whole vectors, are zero.
// Rows for which keep(r) is false become zero too. `scratch` holds kWidth rows.
template <class Keep>
inline void pack_transposed(const Matrices& m, DType dtype, int64_t offset, int64_t rows, int64_t columns, int64_t head_dim,
                            float factor, Keep keep, int64_t stride, float* scratch, float* out) {
  const int64_t width = round_up(head_dim);
  for (int64_t first = 0; first < columns; first += kWidth) {
    for (int64_t r = 0; r < kWidth; ++r) {
      if (first + r < rows && keep(first + r)) {
        load_row(m, dtype, offset + (first + r) * m.row, head_dim, factor, scratch + r * width);
      } else {
        for (int64_t d = 0; d < width; d += kWidth) store(scratch + r * width + d, Vec{});
      }
    }
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      Vec square[kWidth];
      for (int r = 0; r < kWidth; ++r) square[r] = load(scratch + r * width + d);
      transpose(square);
      for (int64_t c = 0; c < kWidth && d + c < head_dim; ++c) store(out + (d + c) * stride + first, square[c]);
    }
  }
}

// Columns to rows: the way back, into rows [0, rows) of a tensor.
inline void unpack_transposed(const float* in, int64_t stride, int64_t rows, int64_t head_dim, float factor,
                              const Matrices& m, DType dtype, int64_t offset, float* scratch) {
  const int64_t width = round_up(head_dim);
  for (int64_t first = 0; first < rows; first += kWidth) {
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      Vec square[kWidth];
      for (int64_t c = 0; c < kWidth; ++c) square[c] = d + c < head_dim ? load(in + (d + c) * stride + first) : Vec{};
      transpose(square);
      for (int r = 0; r < kWidth; ++r) store(scratch + r * width + d, square[r]);
    }
    for (int64_t r = 0; r < kWidth && first + r < rows; ++r) {
      store_row(m, dtype, offset + (first + r) * m.row, head_dim, factor, scratch + r * width);
    }
  }
}
