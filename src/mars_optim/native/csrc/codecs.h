// Blocks of up to kBlock elements: from and to the storage formats. T is the type of the arithmetic; what is not already
// stored as T passes through a small buffer. Included once a level, inside its namespace.

template <class T>
constexpr Format kNative = sizeof(T) == 8 ? kF64 : kF32;

// The levels of the 8-bit formats in units of the first, which are whole numbers: q^2 up to 127^2, q^4 up to 255^4. There
// are no divisions: a step has three codes to read and three to find for each element.
constexpr float kQ8Top = 127.0f * 127.0f, kQ8TopUnsigned = 255.0f * 255.0f;

template <class T>
static void decode_q8(const int8_t* __restrict codes, float scale, int n, T* __restrict out) {
    for (int i = 0; i < n; ++i) {
        const float q = float(codes[i]);
        out[i] = T(scale * (q * std::fabs(q) * (1 / kQ8Top)));
    }
}

template <class T>
static void decode_q8(const uint8_t* __restrict codes, float scale, int n, T* __restrict out) {
    for (int i = 0; i < n; ++i) {
        const float q = float(codes[i]), square = q * q * (1 / kQ8TopUnsigned);
        out[i] = T(scale * (square * square));
    }
}

// Whether 16 random bits send a value up that lies `above` its lower level, the next being `spacing` away.
static inline int32_t goes_up(uint32_t random, float above, float spacing) {
    return (float(int32_t(random)) + 0.5f) * 0x1p-16f * spacing < above ? 1 : 0;
}

// The code of a magnitude, given as a fraction of the scale. Stochastic codes start one below the largest, so that
// there is a level above.
template <bool kDraw>
static inline int32_t q8_code(float ratio, uint32_t random) {
    const float y = 127.0f * std::sqrt(ratio);
    if (!kDraw) return nearest_integer(y);
    const int32_t below = int32_t(y) < 126 ? int32_t(y) : 126;
    const float q = float(below);
    return below + goes_up(random, ratio * kQ8Top - q * q, q + q + 1);
}

template <bool kDraw>
static inline int32_t q8_code_unsigned(float ratio, uint32_t random) {
    const float y = 255.0f * std::sqrt(std::sqrt(ratio));
    if (!kDraw) return nearest_integer(y);
    const int32_t below = int32_t(y) < 254 ? int32_t(y) : 254;
    const float q = float(below), low = q * q, high = (q + 1) * (q + 1);
    return below + goes_up(random, ratio * (kQ8TopUnsigned * kQ8TopUnsigned) - low * low, high * high - low * low);
}

// Magnitudes as fractions of a scale, whose inverse must neither overflow nor be subnormal.
struct Q8Ratio {
    float lift, inverse;

    explicit Q8Ratio(float scale)
        : lift(scale < 0x1p-100f ? 0x1p64f : scale > 0x1p100f ? 0x1p-64f : 1.0f), inverse(1 / (scale * lift)) {}
    float operator()(float x) const { return std::fabs(x) * lift * inverse; }
};

// The largest magnitude; nan if any element is inf or nan.
template <class T>
static float q8_scale(const T* __restrict in, int n) {
    int32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t magnitude = int32_t(bits_of(float(in[i])) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return bit_cast<float>(largest >= 0x7f800000 ? 0x7fc00000 : largest);
}

template <bool kDraw, class T>
static void encode_q8(const T* __restrict in, float scale, int n, const uint32_t* __restrict random, int shift,
                      int8_t* __restrict codes) {
    const Q8Ratio ratio(scale);
    for (int i = 0; i < n; ++i) {
        const float x = float(in[i]);
        const int32_t code = q8_code<kDraw>(ratio(x), kDraw ? (random[i] >> shift) & 0xffff : 0);
        codes[i] = int8_t(x < 0 ? -code : code);
    }
}

template <bool kDraw, class T>
static void encode_q8(const T* __restrict in, float scale, int n, const uint32_t* __restrict random, int shift,
                      uint8_t* __restrict codes) {
    const Q8Ratio ratio(scale);
    for (int i = 0; i < n; ++i) {
        const float x = float(in[i]);
        const int32_t code = q8_code_unsigned<kDraw>(ratio(x), kDraw ? (random[i] >> shift) & 0xffff : 0);
        codes[i] = uint8_t(code == 0 && x > 0 ? 1 : code);  // a zero under a nonzero momentum would explode
    }
}

// Up to kBlock elements, from the start of a run that shares a scale.
template <class Code, class T>
static void encode_q8_runs(const T* in, int n, const uint32_t* random, int shift, Code* codes, float* scales) {
    for (int i = 0; i < n; i += kQ8Block) {
        const int length = n - i < kQ8Block ? n - i : kQ8Block;
        const float scale = q8_scale(in + i, length);
        *scales++ = scale;
        if (!(scale > 0)) std::memset(codes + i, 0, size_t(length));
        else if (random) encode_q8<true>(in + i, scale, length, random + i, shift, codes + i);
        else encode_q8<false>(in + i, scale, length, random, shift, codes + i);
    }
}

template <class Code, class T>
static void decode_q8_runs(const Code* codes, const float* scales, int n, T* out) {
    for (int i = 0; i < n; i += kQ8Block)
        decode_q8(codes + i, *scales++, n - i < kQ8Block ? n - i : kQ8Block, out + i);
}

template <class F, class T>
static void decode_16(const uint16_t* __restrict in, int n, T* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = T(F::widen(in[i]));
}

template <class F, class T>
static void encode_16(const T* __restrict in, int n, uint16_t* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = round_nearest<F>(float(in[i]));
}

template <class F, class T>
static void draw_16(const T* __restrict in, int n, const uint32_t* __restrict random, int shift,
                    uint16_t* __restrict out) {
    constexpr uint32_t kMask = (1u << F::kDropped) - 1;
    for (int i = 0; i < n; ++i) out[i] = F::round(float(in[i]), (random[i] >> shift) & kMask);
}

template <class From, class To>
static void convert(const From* __restrict in, int n, To* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = To(in[i]);
}

static void fill_random(uint32_t key, int64_t start, int n, uint32_t* __restrict random) {
    uint32_t bits = start_of(key) + uint32_t(start) * kGolden;
    for (int i = 0; i < n; ++i, bits += kGolden) random[i] = bits;
}

// An operand as it is stored. `is_signed` chooses between the two 8-bit formats.
struct Stored {
    int32_t format;
    void* data;
    float* scales;
    bool is_signed;
};

template <class P>
static inline P* at(const Stored& s, int64_t i) {
    return static_cast<P*>(s.data) + i;
}

template <class T>
static void decode(const Stored& s, int64_t start, int n, T* out) {
    switch (s.format) {
        case kF32: return convert(at<const float>(s, start), n, out);
        case kF64: return convert(at<const double>(s, start), n, out);
        case kBF16: return decode_16<Bf16>(at<const uint16_t>(s, start), n, out);
        case kF16: return decode_16<Half>(at<const uint16_t>(s, start), n, out);
        default: {
            const float* scales = s.scales + start / kQ8Block;
            if (s.is_signed) return decode_q8_runs(at<const int8_t>(s, start), scales, n, out);
            return decode_q8_runs(at<const uint8_t>(s, start), scales, n, out);
        }
    }
}

// To nearest without `random`; with it bf16 and 8-bit formats draw, from the 16 bits at `shift`.
template <class T>
static void encode(const Stored& s, int64_t start, int n, const T* in, const uint32_t* random = nullptr,
                   int shift = 0) {
    switch (s.format) {
        case kF32: return convert(in, n, at<float>(s, start));
        case kF64: return convert(in, n, at<double>(s, start));
        case kBF16:
            if (random) return draw_16<Bf16>(in, n, random, shift, at<uint16_t>(s, start));
            return encode_16<Bf16>(in, n, at<uint16_t>(s, start));
        case kF16: return encode_16<Half>(in, n, at<uint16_t>(s, start));
        default: {
            float* scales = s.scales + start / kQ8Block;
            if (s.is_signed) return encode_q8_runs(in, n, random, shift, at<int8_t>(s, start), scales);
            return encode_q8_runs(in, n, random, shift, at<uint8_t>(s, start), scales);
        }
    }
}

// The elements as T: where they are if that is how they are stored, else decoded into `buffer`. Null if absent.
template <class T>
static T* view(const Stored& s, int64_t start, int n, T* buffer, bool read = true) {
    if (!s.data) return nullptr;
    if (s.format == kNative<T>) return at<T>(s, start);
    if (read) decode(s, start, n, buffer);
    return buffer;
}

// Undoes `view` after its elements were changed.
template <class T>
static void put_back(const Stored& s, int64_t start, int n, const T* elements, const uint32_t* random = nullptr,
                     int shift = 0) {
    if (s.data && s.format != kNative<T>) encode(s, start, n, elements, random, shift);
}

// Asks for the block that starts at this element.
static inline void prefetch(const Stored& s, int64_t start) {
    if (!s.data) return;
    const int size = s.format == kF64 ? 8 : s.format == kF32 ? 4 : s.format == kQ8 ? 1 : 2;
    const char* block = static_cast<const char*>(s.data) + start * size;
    for (int i = 0; i < kBlock * size; i += 64) MARS_PREFETCH(block + i);
}

// Elements that loops may read and write where they are: as T, or as bf16, which is drawn when written.
template <class T>
static inline T get(const T* p, int i) { return p[i]; }

template <class T>
static inline T get(const uint16_t* p, int i) { return T(Bf16::widen(p[i])); }

template <class T>
static inline void put(T* p, int i, T x, uint32_t) { p[i] = x; }

static inline void put(uint16_t* p, int i, float x, uint32_t random) { p[i] = Bf16::round_quiet(x, random & 0xffff); }

// c = a g + b (ratio g - g')
template <bool kPrev, class T, class P>
static inline T corrected(T g, const P* __restrict prev, int i, T a, T b, T ratio) {
    return kPrev ? fused(b, fused(ratio, g, -get<T>(prev, i)), a * g) : a * g;
}

// The operands of one tensor as they are stored.
struct Operands {
    Stored x, g, prev, next, m, v, vmax, out;

    Operands(const Call& c, const Record& r)
        : x{c.x_format, r.x, nullptr, true}, g{c.g_format, const_cast<void*>(r.g), nullptr, true},
          prev{c.prev_format, const_cast<void*>(r.prev), const_cast<float*>(r.prev_scale), true},
          next{c.prev_format, r.next, r.next_scale, true}, m{c.m_format, r.m, r.m_scale, true},
          v{c.v_format, r.v, r.v_scale, false}, vmax{c.v_format, r.vmax, r.vmax_scale, false},
          out{c.out_format, r.out, nullptr, true} {}
};
