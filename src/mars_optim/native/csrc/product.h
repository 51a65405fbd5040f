// A product of matrices for numbers of one format, `Number`, with AVX-512. Included once a format, in a namespace.
//
// A *unit* is 32 bits: one float, or two bfloat16 numbers that follow each other along the dimension that is summed over,
// which one instruction multiplies and adds. A panel of kColumns columns of the right matrix is brought into the order in
// which it is read, unit by unit, and stays in the second-level cache; tiles of kRows x kColumns sums stay in registers.

constexpr int kRows = 6;
constexpr int kVectors = 4;
constexpr int kColumns = 16 * kVectors;
constexpr int kDepth = 4 / sizeof(Number::Element);  // numbers in a unit

using Element = Number::Element;

static inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

static inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

// panel[unit][column] of `width` columns whose numbers lie one after the other, columns `stride` numbers apart.
static void pack_columns(const Element* right, int64_t stride, int64_t units, int64_t width, int32_t* panel) {
    for (int64_t j = 0; j < kColumns; j += 16)
        for (int64_t p = 0; p < units; p += 16) {
            const __mmask16 mask = first(units - p);
            __m512i r[16];
            for (int64_t i = 0; i < 16; ++i)
                r[i] = j + i < width ? _mm512_maskz_loadu_epi32(mask, right + (j + i) * stride + p * kDepth)
                                     : _mm512_setzero_si512();
            transpose(r);
            const int64_t count = units - p < 16 ? units - p : 16;
            for (int64_t i = 0; i < count; ++i) _mm512_store_si512(panel + (p + i) * kColumns + j, r[i]);
        }
}

// The same from rows: numbers of one row, a number of each column, lie one after the other.
static void pack_rows(const Element* right, int64_t stride, int64_t units, int64_t width, int32_t* panel) {
    for (int64_t p = 0; p < units; ++p)
        for (int64_t j = 0; j < kColumns; j += 16)
            _mm512_store_si512(panel + p * kColumns + j, Number::unit(right + p * kDepth * stride + j, stride, first(width - j)));
}

static inline __m512i broadcast(const Element* unit) {
    int32_t bits;
    std::memcpy(&bits, unit, sizeof bits);
    return _mm512_set1_epi32(bits);
}

// out = beta addend + alpha left right for `rows` <= kRows rows and `width` columns.
static void tile(const Element* left, int64_t stride, int64_t rows, const int32_t* panel, int64_t units, int64_t width,
                 const Element* addend, int64_t addend_stride, float alpha, float beta, Element* out, int64_t out_stride) {
    const Element* row[kRows];
    for (int64_t i = 0; i < kRows; ++i) row[i] = left + (i < rows ? i : 0) * stride;  // what is too much is not stored
    __m512 sums[kRows][kVectors];
    for (auto& vectors : sums)
        for (__m512& sum : vectors) sum = _mm512_setzero_ps();
    for (int64_t p = 0; p < units; ++p) {
        __m512i b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = _mm512_load_si512(panel + p * kColumns + 16 * v);
        for (int i = 0; i < kRows; ++i) {
            const __m512i a = broadcast(row[i] + p * kDepth);
            for (int v = 0; v < kVectors; ++v) sums[i][v] = Number::multiply_add(sums[i][v], a, b[v]);
        }
    }
    for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kVectors; ++v) {
            const __mmask16 mask = i < rows ? first(width - 16 * v) : 0;
            __m512 x = _mm512_mul_ps(sums[i][v], _mm512_set1_ps(alpha));
            if (addend)
                x = _mm512_fmadd_ps(Number::load(addend + i * addend_stride + 16 * v, mask), _mm512_set1_ps(beta), x);
            Number::store(out + i * out_stride + 16 * v, mask, x);
        }
}

// to[j][i] = from[i][j]. Few rows at a time, which stay in the first-level cache while they are read column by column; what
// is written in a row then fills its cache lines, whose distance may be one that few ways of the cache serve.
static void transpose_block(const Element* from, int64_t from_stride, int64_t rows, int64_t columns, Element* to,
                            int64_t to_stride) {
    constexpr int64_t kStrip = 128, kSquare = Number::kSquare;
    for (int64_t top = 0; top < rows; top += kStrip) {
        const int64_t bottom = std::min(top + kStrip, rows), whole = top + (bottom - top) / kSquare * kSquare;
        for (int64_t j = 0; j < columns; j += kSquare) {
            const int64_t end = std::min(j + kSquare, columns);
            int64_t i = top;
            if (end == j + kSquare)
                for (; i < whole; i += kSquare)
                    Number::transpose_square(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
            for (int64_t k = j; k < end; ++k)
                for (int64_t l = i; l < bottom; ++l) to[k * to_stride + l] = from[l * from_stride + k];
        }
    }
}

// Rows [top, bottom) of the columns from `column` on, at most kColumns of them. `panel` and `block` are this thread's.
static void multiply(const Product& c, int64_t column, int64_t top, int64_t bottom, int32_t* panel, void* block) {
    const auto* left = static_cast<const Element*>(c.left);
    const auto* right = static_cast<const Element*>(c.right);
    const auto* addend = static_cast<const Element*>(c.addend);
    auto* out = static_cast<Element*>(c.out);
    const bool transposes = c.flags & kOutTransposed;
    const int64_t units = c.depth / kDepth, width = std::min<int64_t>(kColumns, c.columns - column);
    if (c.flags & kRightTransposed) pack_columns(right + column * c.right_stride, c.right_stride, units, width, panel);
    else pack_rows(right + column, c.right_stride, units, width, panel);
    const int64_t stride = transposes ? kColumns : c.out_stride;
    auto* target = transposes ? static_cast<Element*>(block) : out + top * stride + column;
    for (int64_t i = top; i < bottom; i += kRows)
        tile(left + i * c.left_stride, c.left_stride, std::min<int64_t>(kRows, bottom - i), panel, units, width,
             addend ? addend + i * c.addend_stride + column : nullptr, c.addend_stride, float(c.alpha), float(c.beta),
             target + (i - top) * stride, stride);
    if (transposes) transpose_block(target, stride, bottom - top, width, out + column * c.out_stride + top, c.out_stride);
    else if (c.flags & kTriangle) {
        const int64_t low = std::max(top, column + kColumns);  // above it is the square on the diagonal, which is whole
        if (low < bottom)
            transpose_block(out + low * stride + column, stride, bottom - low, width, out + column * stride + low, stride);
    }
}
