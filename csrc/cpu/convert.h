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

// Copies rows [0, rows) into `out` with leading dimension round_up(head_dim); rows for which keep(row) is false become 0.
template <class Keep>
inline void pack_rows(const Matrices& m, DType dtype, int64_t offset, int64_t rows, int64_t head_dim, float factor,
                      Keep keep, float* out) {
  const int64_t stride = round_up(head_dim);
  for (int64_t r = 0; r < rows; ++r) {
    if (keep(r)) {
      load_row(m, dtype, offset + r * m.row, head_dim, factor, out + r * stride);
    } else {
      for (int64_t d = 0; d < stride; ++d) out[r * stride + d] = 0.0f;
    }
  }
}

// Copies rows transposed: out[d * stride + r], columns [rows, round_up(rows)) zero. `row` holds one row of scratch.
inline void pack_transposed(const Matrices& m, DType dtype, int64_t offset, int64_t rows, int64_t head_dim,
                            int64_t stride, float* row, float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    load_row(m, dtype, offset + r * m.row, head_dim, 1.0f, row);
    for (int64_t d = 0; d < head_dim; ++d) out[d * stride + r] = row[d];
  }
  for (int64_t r = rows; r < round_up(rows); ++r) {
    for (int64_t d = 0; d < head_dim; ++d) out[d * stride + r] = 0.0f;
  }
}
