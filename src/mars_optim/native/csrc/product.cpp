// Products of matrices in fp32 and bfloat16, of which one triangle is enough where the result is symmetric.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "abi.h"
#include "pool.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#define MARS_HAS_PRODUCTS 1

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#endif
namespace mars {
namespace of_floats {

struct Number {
    using Element = float;
    static constexpr int kSquare = 16;

    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }
    static void store(float* to, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(to, mask, x); }
    static __m512i unit(const float* row, int64_t, __mmask16 mask) { return _mm512_maskz_loadu_epi32(mask, row); }
    static inline void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride);
};

#include "product.h"

void Number::transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_stride);
    transpose(r);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, r[i]);
}

}  // namespace of_floats
}  // namespace mars
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
namespace mars {
namespace of_bf16 {

struct Number {
    using Element = uint16_t;
    static constexpr int kSquare = 8;

    static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static __m512 load(const uint16_t* from, __mmask16 mask) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
    }
    static void store(uint16_t* to, __mmask16 mask, __m512 x) {
        _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
    }
    // Of each column the number in this row, and above it the one in the next.
    static __m512i unit(const uint16_t* row, int64_t stride, __mmask16 mask) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row + stride));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
    static void transpose_square(const uint16_t* from, int64_t from_stride, uint16_t* to, int64_t to_stride) {
        __m128i r[8], t[8];
        for (int i = 0; i < 8; ++i) r[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 8; i += 4) {
            r[i] = _mm_unpacklo_epi32(t[i], t[i + 2]);
            r[i + 1] = _mm_unpackhi_epi32(t[i], t[i + 2]);
            r[i + 2] = _mm_unpacklo_epi32(t[i + 1], t[i + 3]);
            r[i + 3] = _mm_unpackhi_epi32(t[i + 1], t[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i * to_stride), _mm_unpacklo_epi64(r[i], r[i + 4]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (2 * i + 1) * to_stride), _mm_unpackhi_epi64(r[i], r[i + 4]));
        }
    }
};

#include "product.h"

}  // namespace of_bf16
}  // namespace mars
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#pragma GCC diagnostic pop

namespace mars {
namespace {

bool has_floats() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

// Not where there are matrix units: they are several times as fast, and torch knows how to use them.
bool has_bf16() {
    unsigned a, b, c, d;
    const bool has_amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return has_floats() && __builtin_cpu_supports("avx512bf16") && !has_amx;
}

// Memory of one thread, kept for the next product.
class Scratch {
public:
    ~Scratch() { release(); }

    char* at_least(size_t size) {
        if (!memory_ || size > size_) {
            release();
            memory_ = static_cast<char*>(::operator new(size, kLine, std::nothrow));
            size_ = memory_ ? size : 0;
        }
        return memory_;
    }

private:
    static constexpr std::align_val_t kLine{64};

    void release() { ::operator delete(memory_, kLine); }

    char* memory_ = nullptr;
    size_t size_ = 0;
};

struct Work {
    const Product& call;
    const int64_t num_panels = (call.columns + of_floats::kColumns - 1) / of_floats::kColumns;
    const int64_t num_bands = std::max<int64_t>(1, (2 * call.num_threads + num_panels - 1) / std::max<int64_t>(1, num_panels));
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};

    static void run(void* self) { static_cast<Work*>(self)->draw(); }

    // Tasks are bands of rows of panels of columns; in a triangle the first panels have the most rows.
    void draw() {
        static_assert(of_floats::kColumns == of_bf16::kColumns && of_floats::kRows == of_bf16::kRows, "tiles are alike");
        constexpr int64_t kColumns = of_floats::kColumns, kRows = of_floats::kRows;
        static thread_local Scratch scratch;
        const bool is_bf16 = call.format == kBF16;
        const size_t panel_size = size_t(call.depth / (is_bf16 ? 2 : 1) * kColumns) * 4;
        const size_t block_size = call.flags & kOutTransposed ? size_t(call.rows * kColumns) * (is_bf16 ? 2 : 4) : 0;
        for (;;) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= num_panels * num_bands) return;
            char* memory = scratch.at_least(panel_size + block_size);
            if (!memory) {
                failed = true;
                return;
            }
            const int64_t column = task / num_bands * kColumns, band = task % num_bands;
            const int64_t start = call.flags & kTriangle ? std::min(column, call.rows) : 0;
            const int64_t height = ((call.rows - start + num_bands - 1) / num_bands + kRows - 1) / kRows * kRows;
            const int64_t top = std::min(start + band * height, call.rows), bottom = std::min(top + height, call.rows);
            if (top == bottom) continue;
            auto* panel = reinterpret_cast<int32_t*>(memory);
            (is_bf16 ? of_bf16::multiply : of_floats::multiply)(call, column, top, bottom, panel, memory + panel_size);
        }
    }
};

}  // namespace
}  // namespace mars
#endif

// Bit f: this CPU multiplies matrices of format f here.
MARS_EXPORT int32_t mars_product_formats() {
#ifdef MARS_HAS_PRODUCTS
    return (mars::has_floats() ? 1 << mars::kF32 : 0) | (mars::has_bf16() ? 1 << mars::kBF16 : 0);
#else
    return 0;
#endif
}

// Returns a Status.
MARS_EXPORT int32_t mars_product(const mars::Product* call) {
    using namespace mars;
    const bool is_bf16 = call->format == kBF16;
    if ((!is_bf16 && call->format != kF32) || (is_bf16 && call->depth % 2) ||
        ((call->flags & kTriangle) && (call->rows != call->columns || (call->flags & kOutTransposed))))
        return kBadCall;
    if (!(mars_product_formats() >> call->format & 1)) return kBadIsa;
#ifdef MARS_HAS_PRODUCTS
    Work work{*call};
    run_parallel(call->num_threads, Work::run, &work);
    return work.failed ? kNoMemory : kOk;
#else
    return kBadIsa;
#endif
}
