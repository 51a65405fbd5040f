// Parameters in 16 bits: what their companion buffer `extra` adds, and how they are rounded. Included once a level,
// inside its namespace.

// x_bits = the parameter's bits, widened to fp32, plus the remainder: an integer, so that nothing is lost.
template <class F, class Extra>
static void join(const uint16_t* __restrict p, const Extra* __restrict extra, int n, float* __restrict x) {
    constexpr int kShift = F::kDropped - 8 * int(sizeof(Extra)) > 0 ? F::kDropped - 8 : 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t remainder = uint32_t(int32_t(extra[i])) << kShift;
        x[i] = bit_cast<float>(bits_of(F::widen(p[i])) + remainder);
    }
}

// Rounds x half up in magnitude, so that the difference of the bits fits. An 8-bit remainder is drawn.
template <class F, class Extra>
static void split(const float* __restrict x, int n, const uint32_t* __restrict random, uint16_t* __restrict p,
                  Extra* __restrict extra) {
    constexpr bool kDraw = sizeof(Extra) == 1;
    constexpr int kShift = kDraw ? F::kDropped - 8 : 0;
    constexpr int32_t kLargest = kDraw ? 127 : 32767;
    for (int i = 0; i < n; ++i) {
        const uint16_t rounded = F::round(x[i], 1u << (F::kDropped - 1));
        const uint32_t bits = bits_of(x[i]), nearest = bits_of(F::widen(rounded));
        // Both have the same sign bit. It can only be fp16's subnormals that do not fit.
        int32_t difference = int32_t(bits - nearest);
        if (kDraw) difference = (difference + int32_t((random[i] >> 16) & ((1u << kShift) - 1))) >> kShift;
        difference = difference > kLargest ? kLargest : difference;
        difference = difference < -kLargest - 1 ? -kLargest - 1 : difference;
        // A finite x that fp16 rounds to infinity has no remainder either.
        const uint32_t judged = F::kDropped == 13 ? nearest : bits;
        p[i] = rounded;
        extra[i] = Extra(int32_t(judged & 0x7fffffffu) >= 0x7f800000 ? 0 : difference);
    }
}

template <class F>
static void add_compensation(const uint16_t* __restrict p, const uint16_t* __restrict extra, int n,
                             float* __restrict x) {
    for (int i = 0; i < n; ++i) x[i] = F::widen(p[i]) + F::widen(extra[i]);
}

template <class F>
static void compensate(const float* __restrict x, int n, uint16_t* __restrict p, uint16_t* __restrict extra) {
    for (int i = 0; i < n; ++i) {
        p[i] = round_nearest<F>(x[i]);
        const float rest = x[i] - F::widen(p[i]);
        extra[i] = round_nearest<F>(rest - rest == 0 ? rest : 0.0f);  // inf - inf is no remainder
    }
}

template <class F>
static void load_narrow(const Call& call, const Record& r, int64_t start, int n, float* x) {
    const uint16_t* p = static_cast<const uint16_t*>(r.x) + start;
    switch (call.rounding) {
        case kKahan: return add_compensation<F>(p, static_cast<const uint16_t*>(r.extra) + start, n, x);
        case kRemainder16: return join<F>(p, static_cast<const int16_t*>(r.extra) + start, n, x);
        case kRemainder8: return join<F>(p, static_cast<const int8_t*>(r.extra) + start, n, x);
        default: return decode_16<F>(p, n, x);
    }
}

template <class F>
static void store_narrow(const Call& call, const Record& r, int64_t start, int n, const float* x,
                         const uint32_t* random) {
    uint16_t* p = static_cast<uint16_t*>(r.x) + start;
    switch (call.rounding) {
        case kStochastic: return draw_16<F>(x, n, random, 16, p);
        case kKahan: return compensate<F>(x, n, p, static_cast<uint16_t*>(r.extra) + start);
        case kRemainder16: return split<F>(x, n, random, p, static_cast<int16_t*>(r.extra) + start);
        case kRemainder8: return split<F>(x, n, random, p, static_cast<int8_t*>(r.extra) + start);
        default: return encode_16<F>(x, n, p);
    }
}

static inline double* load_x(const Call&, const Record& r, int64_t start, int, double*) {
    return static_cast<double*>(r.x) + start;
}

static inline float* load_x(const Call& call, const Record& r, int64_t start, int n, float* buffer) {
    if (call.x_format == kF32) return static_cast<float*>(r.x) + start;
    if (call.x_format == kBF16) load_narrow<Bf16>(call, r, start, n, buffer);
    else load_narrow<Half>(call, r, start, n, buffer);
    return buffer;
}

static inline void store_x(const Call&, const Record&, int64_t, int, const double*) {}

static inline void store_x(const Call& call, const Record& r, int64_t start, int n, const float* x) {
    if (call.x_format == kF32) return;
    uint32_t random[kBlock];
    if (call.rounding == kStochastic || call.rounding == kRemainder8)
        fill_random(uint32_t(r.key) ^ kOfWeights, start, n, random);
    if (call.x_format == kBF16) return store_narrow<Bf16>(call, r, start, n, x, random);
    return store_narrow<Half>(call, r, start, n, x, random);
}
