// The kernels, once for each level of the instruction set: the same source, which the compiler vectorises as wide as the
// level allows. Multiplications and additions are fused where the source says so and nowhere else, so that all levels that
// have the instruction agree bit for bit; x86-64's baseline lacks it.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "abi.h"

namespace mars {

// Elements at a time: a block's buffers, and the operands on their way for the blocks to come, fit the first-level cache.
constexpr int kBlock = 256;
constexpr int kFar = 4 * kBlock;  // how far ahead blocks ask for operands; so much of g is copied at a time
constexpr int kLine = 32;  // a line of memory in bf16, two in fp32; as many lanes have sums
static_assert(kBlock % kQ8Block == 0, "a scale belongs to one block");

}  // namespace mars

#if (defined(__SSE2__) || defined(_M_X64)) && !defined(MARS_NO_STREAM)
#define MARS_HAS_STREAM
#include <emmintrin.h>
#endif
#ifdef _MSC_VER
#include <intrin.h>
#define MARS_PREFETCH(address) _mm_prefetch(address, _MM_HINT_T0)
#define MARS_INLINE static __forceinline
#define MARS_IVDEP __pragma(loop(ivdep))
#else
#define MARS_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define MARS_IVDEP _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define MARS_IVDEP _Pragma("GCC ivdep")
#endif
#define MARS_PREFETCH(address) __builtin_prefetch(address)
#endif

#if defined(__FMA__) || (defined(__aarch64__) && defined(__GNUC__))
#define MARS_HAS_FMA
#endif

#define MARS_LEVEL baseline
#include "level.h"
#undef MARS_LEVEL

#if defined(__x86_64__) && defined(__GNUC__)
#define MARS_HAS_LEVELS
#undef MARS_HAS_FMA
#define MARS_HAS_FMA

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MARS_LEVEL avx2
#include "level.h"
#undef MARS_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define MARS_LEVEL avx512
#include "level.h"
#undef MARS_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace mars {

const Kernels* kernels_for(int32_t isa, int32_t arithmetic) {
    if (isa == kBaseline) return &baseline::kKernels[arithmetic];
#ifdef MARS_HAS_LEVELS
    __builtin_cpu_init();
    if (isa == kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2::kKernels[arithmetic];
    if (isa == kAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return &avx512::kKernels[arithmetic];
#endif
    return nullptr;
}

}  // namespace mars
