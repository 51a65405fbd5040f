// Single numbers: 16-bit formats by integer arithmetic, so that every compiler vectorises them at every level and
// subnormals survive a flush-to-zero mode; and the random bits. Included once a level, inside its namespace.

template <class To, class From>
static inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same width");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static inline uint32_t bits_of(float x) { return bit_cast<uint32_t>(x); }

// x y + z, rounded once where the level has an instruction for it.
template <class T>
static inline T fused(T x, T y, T z) {
#ifdef MARS_HAS_FMA
    return sizeof(T) == sizeof(float) ? T(__builtin_fmaf(float(x), float(y), float(z))) : T(__builtin_fma(x, y, z));
#else
    return x * y + z;
#endif
}

// Element i has the 32 random bits start_of(key) + i * kGolden. torch and Triton spell the same function;
// `mars_optim.state.random_bits` says why it does.
constexpr uint32_t kGolden = 0x9E3779B1u;
constexpr uint32_t kOfWeights = 0x5bd1e995u;  // sets the weights' key apart from the moments'

static inline uint32_t start_of(uint32_t key) {
    uint32_t h = key;
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    return h ^ (h >> 16);
}

// A 16-bit format drops the low bits of a float's magnitude after an addend below 2^kDropped was added to it: the
// addend decides how it rounds.
struct Bf16 {
    static constexpr int kDropped = 16;

    static inline float widen(uint16_t h) { return bit_cast<float>(uint32_t(h) << 16); }

    static inline uint16_t round(float x, uint32_t addend) {
        const uint32_t bits = bits_of(x);
        const bool is_nan = x != x;
        return uint16_t((is_nan ? (bits | 0x400000u) : bits + addend) >> 16);
    }

    // For x whose nan, if it is one, comes from `quiet` or was bf16: its low bits leave room for the addend.
    static inline uint16_t round_quiet(float x, uint32_t addend) { return uint16_t((bits_of(x) + addend) >> 16); }
};

struct Half {
    static constexpr int kDropped = 13;

    static inline float widen(uint16_t h) {
        const int32_t magnitude = h & 0x7fff;
        const uint32_t rebias = 112u << 23;  // from exponent bias 15 to 127
        const uint32_t subnormal = bits_of(float(magnitude) * 0x1p-24f);
        uint32_t bits = (uint32_t(magnitude) << 13) + rebias;
        bits = magnitude >= 0x7c00 ? bits + rebias : bits;
        bits = magnitude < 0x400 ? subnormal : bits;
        return bit_cast<float>(bits | (uint32_t(h & 0x8000) << 16));
    }

    // Subnormal results round to nearest whatever the addend.
    static inline uint16_t round(float x, uint32_t addend) {
        const uint32_t bits = bits_of(x);
        const int32_t magnitude = int32_t(bits & 0x7fffffffu);
        // The spacing of floats in [0.5, 1) is that of fp16's subnormals.
        const uint32_t subnormal = bits_of(bit_cast<float>(magnitude) + 0.5f) - bits_of(0.5f);
        uint32_t half = (uint32_t(magnitude) + addend - (112u << 23)) >> 13;
        half = magnitude < 0x38800000 ? subnormal : half;
        half = magnitude >= 0x47800000 ? 0x7c00u : half;
        half = magnitude > 0x7f800000 ? 0x7e00u | ((uint32_t(magnitude) >> 13) & 0x3ffu) : half;
        return uint16_t(half | ((bits >> 16) & 0x8000u));
    }
};

template <bool kIsRounded, class T>
static inline T quiet(T x) { return !kIsRounded || x == x ? x : T(bit_cast<float>(0x7fc00000u)); }

template <class F>
static inline uint16_t round_nearest(float x) {
    const uint32_t odd = (bits_of(x) >> F::kDropped) & 1;
    return F::round(x, (1u << (F::kDropped - 1)) - 1 + odd);
}

// To nearest, halves to even, for 0 <= y < 2^22; SSE2 has no instruction for it.
static inline int32_t nearest_integer(float y) { return int32_t(bits_of(y + 0x1p23f) - bits_of(0x1p23f)); }
