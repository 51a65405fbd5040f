// The C interface: what one call says and what one tensor's record holds. `native_library.py` mirrors this file; a
// change of either raises kAbiVersion in both.
#pragma once

#include <cstdint>

#ifdef _WIN32
#define MARS_EXPORT extern "C" __declspec(dllexport)
#else
#define MARS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace mars {

constexpr int32_t kAbiVersion = 4;
constexpr int kQ8Block = 128;  // elements that share one scale

enum Op : int32_t { kProducts, kAdamw, kLion, kMomentum, kDescend, kNumOps };
enum Arithmetic : int32_t { kFloat, kDouble, kNumArithmetics };
enum Format : int32_t { kF32, kF64, kBF16, kF16, kQ8, kNumFormats };
enum Rounding : int32_t { kNearest, kStochastic, kKahan, kRemainder16, kRemainder8, kNumRoundings };
enum Flag : int32_t { kOneBuffer = 1, kAmsgrad = 2, kStochasticM = 4, kStochasticV = 8 };
enum Isa : int32_t { kBaseline, kAvx2, kAvx512, kNumIsas };
enum Status : int32_t { kOk, kBadCall, kBadIsa, kNoMemory };

// One batch: tensors with equal formats that take the same step.
struct Call {
    int32_t op;
    int32_t arithmetic;
    int32_t x_format;     // F32, BF16, F16; F64 if and only if the arithmetic is double
    int32_t g_format;     // any but Q8
    int32_t prev_format;  // of prev and next
    int32_t m_format;
    int32_t v_format;    // of v and vmax
    int32_t out_format;  // any but Q8
    int32_t rounding;    // of x
    int32_t flags;
    int32_t num_threads;
    int32_t reserved;
    double beta1;
    double beta2;
    double eps;
    double clip_norm;  // <= 0: no clipping by the norm of c
};

// One tensor: 26 words of 64 bits. Null pointers are absent operands; scales belong to Q8 alone. `next` may be the record's
// own `prev`, memory of its own, or the `prev` of a record further on in the call, which is worked through from the end, if
// either has 2^17 elements.
struct Record {
    int64_t n;
    void* x;
    void* extra;
    const void* g;
    const void* prev;
    const float* prev_scale;
    void* next;
    float* next_scale;
    void* m;
    float* m_scale;
    void* v;
    float* v_scale;
    void* vmax;
    float* vmax_scale;
    void* out;
    uint64_t key;  // of the random bits; the low half counts
    double a;  // c = a g + b (ratio g - g')
    double b;
    double ratio;
    double we;  // one buffer: m = we e + wg g
    double wg;
    double decay;  // x <- decay x - step_size * direction
    double step_size;
    double inv_sqrt_bias2;
    double g_norm;     // the 2-norms of g and of g' where the caller knows them (of g' an upper bound will do), else
    double prev_norm;  // infinity: with them a clip that is not needed is recognised without reading g'
};
static_assert(sizeof(Call) == 80 && sizeof(Record) == 26 * 8, "native_library.py packs these by hand");

enum ProductFlag : int32_t { kRightTransposed = 1, kOutTransposed = 2, kTriangle = 4 };

// out = beta addend + alpha left right. Matrices are stored row by row, a stride being the distance of rows in numbers;
// `right` and `out` may be given as their transposes. A triangle: the result is symmetric up to rounding, its lower part is
// computed and mirrored; what `out` had must not overlap an operand.
struct Product {
    int32_t format;  // of all four: F32, BF16
    int32_t flags;
    int32_t num_threads;
    int32_t reserved;
    int64_t rows;
    int64_t columns;
    int64_t depth;  // that is summed over; even for BF16
    const void* left;
    const void* right;
    const void* addend;  // null where there is none
    void* out;
    int64_t left_stride;
    int64_t right_stride;
    int64_t addend_stride;
    int64_t out_stride;
    double alpha;
    double beta;
};
static_assert(sizeof(Product) == 120, "native_product.py mirrors it");

// What each level of the instruction set provides: the same functions over a range of one tensor's elements that starts
// at a multiple of kQ8Block, or where `advance` has left off. `measure` adds nothing up across calls: it overwrites
// sums[0..2].
struct Kernels {
    void (*measure)(const Call&, const Record&, int64_t start, int64_t count, double* sums);
    void (*update)(const Call&, const Record&, int64_t start, int64_t count, double clip);
    // Whether what `advance` does to a tensor can be amended.
    bool (*can_advance)(const Call&, const Record&);
    // Bounds g.g from above, and updates with clip = 1 up to the line that takes a lane's sum beyond the limit; returns
    // how many elements that were.
    int32_t (*advance)(const Call&, const Record&, int64_t start, int64_t count, double limit, double* square);
    // After an update with clip = 1: makes it one with this clip.
    void (*amend)(const Call&, const Record&, int64_t start, int64_t count, double clip);
};

// Null where the level was not compiled or this CPU lacks it.
const Kernels* kernels_for(int32_t isa, int32_t arithmetic);

}  // namespace mars
