// The step, a block of elements at a time. Included once a level, inside its namespace.

// A call's and a record's numbers in the arithmetic's type. a and b have the clip factor in them.
template <class T>
struct Weights {
    T a, b, ratio, beta1, rest1, beta2, rest2, eps, we, wg, decay, step_size, inv_sqrt_bias2;

    Weights(const Call& call, const Record& r, double clip)
        : a(T(clip * r.a)), b(T(clip * r.b)), ratio(T(r.ratio)), beta1(T(call.beta1)), rest1(T(1 - call.beta1)),
          beta2(T(call.beta2)), rest2(T(1 - call.beta2)), eps(T(call.eps)), we(T(r.we)), wg(T(r.wg)),
          decay(T(r.decay)), step_size(T(r.step_size)), inv_sqrt_bias2(T(r.inv_sqrt_bias2)) {}
};

// step * sign(m); zeros and nan are their own.
template <class T>
static inline T signed_step(T step, T m) {
    return std::fabs(m) > 0 ? std::copysign(step, m) : m;
}

template <class T>
static inline T first_moment(T m, T c, const Weights<T>& k) {
    return fused(k.beta1, m, k.rest1 * c);
}

template <class T>
static inline T second_moment(T v, T c, const Weights<T>& k) {
    return fused(k.beta2, v, k.rest2 * (c * c));
}

// The part of AdamW's step that depends on the moments.
template <class T>
static inline T adamw_step(T m, T v, const Weights<T>& k) {
    return k.step_size * m / fused(std::sqrt(v), k.inv_sqrt_bias2, k.eps);
}

template <class T>
static inline void keep(T* prev, int i, T g) { prev[i] = g; }
static inline void keep(uint16_t* prev, int i, float g) {
    prev[i] = Bf16::round_quiet(g, 0x7fff + ((bits_of(g) >> 16) & 1));
}

template <class T>
static inline T larger(T x, T y) {
    return x >= y || x != x ? x : y;  // nan if either is
}

// Moments are stored as S, drawn if that is bf16, and the previous gradient as P. kKeep: g takes the place of g'. No two
// of the arrays overlap.
template <bool kPrev, bool kMax, bool kKeep = false, class T, class P, class S>
MARS_INLINE void adamw(int n, const Weights<T>& k, const T* __restrict g, P* __restrict prev, S* __restrict m,
                       S* __restrict v, T* __restrict vmax, T* __restrict x, uint32_t random = 0) {
    MARS_IVDEP
    for (int i = 0; i < n; ++i) {
        const T gi = quiet<sizeof(S) == 2 || kKeep>(g[i]);
        const T c = corrected<kPrev>(gi, prev, i, k.a, k.b, k.ratio);
        const T mi = first_moment(get<T>(m, i), c, k);
        const T vi = second_moment(get<T>(v, i), c, k);
        const T top = kMax ? larger(vmax[i], vi) : vi;
        put(m, i, mi, random);
        put(v, i, vi, random >> 16);
        random += kGolden;
        if (kMax) vmax[i] = top;
        if (kKeep) keep(prev, i, gi);
        x[i] = fused(k.decay, x[i], -adamw_step(mi, top, k));
    }
}

template <bool kPrev, bool kOne, bool kKeep = false, class T, class P, class S>
MARS_INLINE void lion(int n, const Weights<T>& k, const T* __restrict g, P* __restrict prev, S* __restrict m,
                      T* __restrict x, uint32_t random = 0) {
    MARS_IVDEP
    for (int i = 0; i < n; ++i) {
        const T gi = quiet<sizeof(S) == 2 || kKeep>(g[i]);
        const T mi = first_moment(get<T>(m, i), corrected<kPrev>(gi, prev, i, k.a, k.b, k.ratio), k);
        put(m, i, mi, random);
        random += kGolden;
        if (kKeep) keep(prev, i, gi);
        x[i] = k.decay * x[i] - signed_step(k.step_size, kOne ? fused(k.we, mi, k.wg * gi) : mi);
    }
}

template <bool kPrev, bool kOne, class T>
static void momentum(int n, const Weights<T>& w, const T* __restrict g, const T* __restrict prev, T* __restrict m,
                     T* __restrict out) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T mi = first_moment(m[i], corrected<kPrev>(g[i], prev, i, k.a, k.b, k.ratio), k);
        m[i] = mi;
        out[i] = kOne ? fused(k.we, mi, k.wg * g[i]) : mi;
    }
}

template <class T>
static void descend(int n, const Weights<T>& w, const T* __restrict direction, T* __restrict x) {
    for (int i = 0; i < n; ++i) x[i] = fused(w.decay, x[i], -(w.step_size * direction[i]));
}

// Every combination of two switches, as template arguments of one function.
#define MARS_DISPATCH(function, first, second, ...)               \
    ((first) ? (second) ? function<true, true>(__VA_ARGS__)       \
                        : function<true, false>(__VA_ARGS__)      \
             : (second) ? function<false, true>(__VA_ARGS__)      \
                        : function<false, false>(__VA_ARGS__))

template <class T>
static void step_block(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start,
                       int n) {
    T g_buffer[kBlock], prev_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock], x_buffer[kBlock];
    const bool one_buffer = call.flags & kOneBuffer;
    const T* g = view(o.g, start, n, g_buffer);
    T* prev = w.b == 0 ? nullptr : view(o.prev, start, n, prev_buffer);
    T* m = view(o.m, start, n, m_buffer);
    uint32_t random[kBlock];
    const bool draws = call.flags & (kStochasticM | kStochasticV);
    if (draws) fill_random(uint32_t(r.key), start, n, random);
    if (call.op == kMomentum) {
        T* out = o.out.data ? view(o.out, start, n, out_buffer, false) : out_buffer;
        MARS_DISPATCH(momentum, prev, one_buffer, n, w, g, prev, m, out);
        put_back(o.out, start, n, out);
    } else {
        T* x = load_x(call, r, start, n, x_buffer);
        if (call.op == kAdamw) {
            T v_buffer[kBlock], vmax_buffer[kBlock];
            T* v = view(o.v, start, n, v_buffer);
            const bool amsgrad = call.flags & kAmsgrad;
            T* vmax = amsgrad ? view(o.vmax, start, n, vmax_buffer) : nullptr;
            MARS_DISPATCH(adamw, prev, amsgrad, n, w, g, prev, m, v, vmax, x);
            put_back(o.v, start, n, v, call.flags & kStochasticV ? random : nullptr, 16);
            if (amsgrad) put_back(o.vmax, start, n, vmax);
        } else {
            MARS_DISPATCH(lion, prev, one_buffer, n, w, g, prev, m, x);
        }
        store_x(call, r, start, n, x);
    }
    put_back(o.m, start, n, m, call.flags & kStochasticM ? random : nullptr, 0);
    if (o.next.data) encode(o.next, start, n, g);  // last: prev may be the same memory
}

// What a walk works through at a time: a line of memory in bf16, two in fp32.
constexpr int kLine = 32;

template <class P>
static inline void ask(const P* first, int64_t ahead) {
    const char* address = reinterpret_cast<const char*>(first) + ahead * int64_t(sizeof(P));
    for (int i = 0; i < kLine * int(sizeof(P)); i += 64) MARS_PREFETCH(address + i);
}

// Copies a line past the cache: nobody will read it but in the rare case.
static inline void put_aside(const uint16_t* in, uint16_t* out) {
#ifdef MARS_HAS_STREAM
    for (int i = 0; i < kLine; i += 8)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#else
    std::memcpy(out, in, kLine * sizeof(uint16_t));
#endif
}
static inline void put_aside(const float*, uint16_t*) {}  // is not overwritten
static inline void put_aside(const double*, uint16_t*) {}

// What a step does beside being taken, before it is known whether c has to be clipped.
template <class T>
struct Beside {
    T* squares;         // kLine sums of g.g over the tile to come, if there is one
    uint16_t* journal;  // where g' goes before it is overwritten
};

// The step where the moments and g' are, stored as S and P. The operands of the tile to come, if there is one, are asked
// for line by line, so that memory has something to do all the time.
template <bool kIsAdamw, bool kPrev, bool kOne, bool kKeep, bool kBeside, class T, class P, class S>
static void walk(int n, int64_t ahead, const Weights<T>& w, const T* g, P* prev, S* m, S* v, T* x, uint32_t random,
                 const Beside<T>& beside) {
    const Weights<T> k = w;
    T squares[kLine] = {};
    int i = 0;
    for (; i + kLine <= n; i += kLine, random += kLine * kGolden) {
        ask(g + i, kBeside ? 2 * ahead : ahead);
        ask(x + i, ahead);
        ask(m + i, ahead);
        if (kIsAdamw) ask(v + i, ahead);
        if (kPrev) ask(prev + i, ahead);
        if (kBeside)
            for (int j = 0; j < kLine; ++j) squares[j] = fused(g[i + ahead + j], g[i + ahead + j], squares[j]);
        if (kBeside && kKeep) put_aside(prev + i, beside.journal + i);
        P* const before = kPrev ? prev + i : prev;
        if (kIsAdamw) adamw<kPrev, false, kKeep>(kLine, k, g + i, before, m + i, v + i, static_cast<T*>(nullptr), x + i, random);
        else lion<kPrev, kOne, kKeep>(kLine, k, g + i, before, m + i, x + i, random);
    }
    P* const before = kPrev ? prev + i : prev;
    if (kBeside && kKeep) std::memcpy(beside.journal + i, before, size_t(n - i) * sizeof(uint16_t));
    if (kIsAdamw) adamw<kPrev, false, kKeep>(n - i, k, g + i, before, m + i, v + i, static_cast<T*>(nullptr), x + i, random);
    else lion<kPrev, kOne, kKeep>(n - i, k, g + i, before, m + i, x + i, random);
    if (kBeside) std::memcpy(beside.squares, squares, sizeof squares);
}

// Whether g takes the place of g' as the step is taken.
static inline bool overwrites_prev(const Call& c, const Record& r) {
    return r.next && r.next == r.prev && c.prev_format == kBF16;
}

// The instance of `walk` for a call and a record.
template <class T, class P, class S>
static void walk_as(const Call& c, const Record& r, int n, int64_t ahead, const Weights<T>& w, const T* g, P* prev, S* m,
                    S* v, T* x, uint32_t random, const Beside<T>* beside) {
    const bool is_adamw = c.op == kAdamw, keeps = w.b != 0 && overwrites_prev(c, r);
    const Beside<T> nothing{};
#define MARS_WALK(has_prev, one, keep, beside_too, what) \
    (is_adamw ? walk<true, has_prev, false, keep, beside_too>(n, ahead, w, g, prev, m, v, x, random, what) \
              : walk<false, has_prev, one, keep, beside_too>(n, ahead, w, g, prev, m, v, x, random, what))
    constexpr bool kMayKeep = sizeof(P) == sizeof(uint16_t);
    if (beside) return keeps ? MARS_WALK(true, false, kMayKeep, true, *beside) : MARS_WALK(true, false, false, true, *beside);
    if (w.b == 0 || !prev)
        return c.flags & kOneBuffer ? MARS_WALK(false, true, false, false, nothing) : MARS_WALK(false, false, false, false, nothing);
    return keeps ? MARS_WALK(true, false, kMayKeep, false, nothing) : MARS_WALK(true, false, false, false, nothing);
#undef MARS_WALK
}

// Whether the step can be taken where moments and g' are: the usual formats, in one loop.
template <class T>
static inline bool is_in_place(const Call& c, const Record& r) {
    constexpr bool kNarrow = sizeof(T) == sizeof(float);
    const bool is_adamw = c.op == kAdamw;
    const int32_t draws = kStochasticM | (is_adamw ? kStochasticV : 0);
    const bool has_moments = c.m_format == kNative<T> || (kNarrow && c.m_format == kBF16 && (c.flags & draws) == draws);
    const bool has_prev = !r.prev || (!(c.flags & kOneBuffer) && (c.prev_format == kNative<T> || (kNarrow && c.prev_format == kBF16)));
    return (is_adamw ? c.v_format == c.m_format && !(c.flags & kAmsgrad) : c.op == kLion) && has_moments && has_prev;
}

// And weights and gradients too: then it is not limited to a block, the size of buffers.
template <class T>
static inline bool is_direct(const Call& c, const Record& r) {
    return c.x_format == kNative<T> && c.g_format == kNative<T> && is_in_place<T>(c, r);
}

template <class T>
static void walk_block(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start, int n,
                       int64_t ahead, const Beside<T>* beside) {
    T g_buffer[kBlock], x_buffer[kBlock];
    const T* g = view(o.g, start, n, g_buffer);
    T* x = load_x(call, r, start, n, x_buffer);
    const uint32_t random = start_of(uint32_t(r.key)) + uint32_t(start) * kGolden;
    const auto walk_from = [&](auto* prev, auto* m, auto* v) {
        walk_as(call, r, n, ahead, w, g, prev ? prev + start : prev, m + start, v ? v + start : v, x, random, beside);
    };
    const auto walk_over = [&](auto* m) {
        auto* v = static_cast<decltype(m)>(r.v);
        void* prev = const_cast<void*>(r.prev);
        if (sizeof(T) == sizeof(float) && call.prev_format == kBF16) walk_from(static_cast<uint16_t*>(prev), m, v);
        else walk_from(static_cast<T*>(prev), m, v);
    };
    if (sizeof(T) == sizeof(float) && call.m_format == kBF16) walk_over(static_cast<uint16_t*>(r.m));
    else walk_over(static_cast<T*>(r.m));
    store_x(call, r, start, n, x);
    if (o.next.data && !(w.b != 0 && overwrites_prev(call, r))) encode(o.next, start, n, g);
}

template <class T>
static void descend_block(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start,
                          int n) {
    T out_buffer[kBlock], x_buffer[kBlock];
    T* x = load_x(call, r, start, n, x_buffer);
    descend(n, w, view(o.out, start, n, out_buffer), x);
    store_x(call, r, start, n, x);
}

static inline void prefetch_step(const Operands& o, int64_t start) {
    prefetch(o.x, start);
    prefetch(o.g, start);
    prefetch(o.prev, start);
    prefetch(o.m, start);
    prefetch(o.v, start);
    prefetch(o.out, start);
}

// At most a tile; asks for the one to come, whoever will work on it.
template <class T>
static inline void step_tile(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start,
                             int n, const Beside<T>* beside = nullptr) {
    const bool direct = is_direct<T>(call, r);
    if (direct) return walk_block(call, r, o, w, start, n, r.n - start >= 2 * kAhead ? kAhead : 0, beside);
    for (int64_t i = start; i < start + n; i += kBlock) {
        const int length = int(start + n - i < kBlock ? start + n - i : kBlock);
        if (r.n - i >= kAhead + kBlock) prefetch_step(o, i + kAhead);
        if (call.op == kDescend) descend_block(call, r, o, w, i, length);
        else if (is_in_place<T>(call, r)) walk_block(call, r, o, w, i, length, 0, beside);
        else step_block(call, r, o, w, i, length);
    }
}

template <class T>
static void update(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Operands operands(call, r);
    const Weights<T> weights(call, r, clip);
    for (int64_t i = 0; i < count; i += kAhead)
        step_tile(call, r, operands, weights, start + i, int(count - i < kAhead ? count - i : kAhead));
}

// What an update needs can be had again: g stays, g' does or goes to the journal, and weights are stored as precisely as
// they are computed.
template <class T>
static bool can_advance(const Call& c, const Record& r) {
    return is_direct<T>(c, r) && r.prev && T(r.b) != 0 && (!r.next || overwrites_prev(c, r));
}

template <class T>
static int32_t advance(const Call& call, const Record& r, int64_t start, int64_t count, double limit, double* square,
                       uint16_t* journal) {
    const Operands operands(call, r);
    const Weights<T> weights(call, r, 1.0);
    const T* g = at<const T>(operands.g, start);
    T squares[kLine];
    const auto length = [=](int64_t tile) { return int(count - tile < kAhead ? count - tile : kAhead); };
    double sum = bound_of_squares(g, length(0));
    int64_t tile = 0, done = 0;
    for (; tile < count && sum <= limit; tile += kAhead) {
        const Beside<T> beside{squares, journal ? journal + start + tile : nullptr};
        step_tile(call, r, operands, weights, start + tile, length(tile), &beside);
        done = tile + length(tile);
        if (done == count) break;
        const int to_come = length(done);
        sum += to_come == kAhead ? bound_of_sum(squares, g + done, to_come) : bound_of_squares(g + done, to_come);
    }
    for (tile = done + kAhead; tile < count; tile += kAhead) sum += bound_of_squares(g + tile, length(tile));
#ifdef MARS_HAS_STREAM
    if (journal) _mm_sfence();
#endif
    *square = sum;
    return int32_t(done);
}

// What a moment of x is once it has been stored.
template <bool kNarrow, class T>
static inline T once_stored(T x, uint32_t random) {
    return kNarrow ? T(Bf16::widen(Bf16::round(float(x), random & 0xffff))) : x;
}

// The two steps again, from what they left with clip = 1: takes c's part away and adds the clipped one. What was there
// before c comes back to within the rounding of what is stored, and exactly where it was 0. kNarrow: moments were drawn, as
// bf16; of a v that has sunk in that rounding a spacing is left, more rather than less, for m is divided by its root.
template <bool kNarrow, class T>
static void amend_adamw(int n, const Weights<T>& w, T clip, const T* __restrict g, const T* __restrict prev,
                        T* __restrict m, T* __restrict v, T* __restrict x, const uint32_t* __restrict random) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = corrected<true>(g[i], prev, i, k.a, k.b, k.ratio), clipped = clip * c;
        const T of_m = k.rest1 * c, of_v = k.rest2 * (c * c);
        const bool was_0 = m[i] == once_stored<kNarrow>(of_m, random[i]) && v[i] == once_stored<kNarrow>(of_v, random[i] >> 16);
        const T spacing = kNarrow ? v[i] * T(0x1p-7f) : T(0);
        const T mi = (was_0 ? T(0) : m[i] - of_m) + k.rest1 * clipped;
        const T vi = (was_0 ? T(0) : larger(v[i] - of_v, spacing)) + k.rest2 * (clipped * clipped);
        x[i] += adamw_step(was_0 ? of_m : m[i], was_0 ? of_v : v[i], k) - adamw_step(mi, vi, k);
        m[i] = mi;
        v[i] = vi;
    }
}

template <bool kNarrow, class T>
static void amend_lion(int n, const Weights<T>& w, T clip, const T* __restrict g, const T* __restrict prev,
                       T* __restrict m, T* __restrict x, const uint32_t* __restrict random) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = corrected<true>(g[i], prev, i, k.a, k.b, k.ratio), of_m = k.rest1 * c;
        const bool was_0 = m[i] == once_stored<kNarrow>(of_m, random[i]);
        const T mi = (was_0 ? T(0) : m[i] - of_m) + k.rest1 * (clip * c);
        x[i] += signed_step(k.step_size, m[i]) - signed_step(k.step_size, mi);
        m[i] = mi;
    }
}

// Weights and gradients stored as T. Moments in bf16 are drawn once more, so that they are right on average.
template <class T>
static void amend(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Operands o(call, r);
    const Weights<T> w(call, r, 1.0);
    const bool narrow = call.m_format != kNative<T>;
    T prev_buffer[kBlock], m_buffer[kBlock], v_buffer[kBlock];
    uint32_t random[kBlock];
    for (int64_t i = start; i < start + count; i += kBlock) {
        const int n = int(start + count - i < kBlock ? start + count - i : kBlock);
        fill_random(uint32_t(r.key), i, n, random);
        const T* g = at<const T>(o.g, i);
        const T* prev = view(o.prev, i, n, prev_buffer);
        T* m = view(o.m, i, n, m_buffer);
        T* x = at<T>(o.x, i);
        if (call.op == kAdamw) {
            T* v = view(o.v, i, n, v_buffer);
            if (narrow) amend_adamw<true>(n, w, T(clip), g, prev, m, v, x, random);
            else amend_adamw<false>(n, w, T(clip), g, prev, m, v, x, random);
            put_back(o.v, i, n, v, random, 16);
        } else {
            if (narrow) amend_lion<true>(n, w, T(clip), g, prev, m, x, random);
            else amend_lion<false>(n, w, T(clip), g, prev, m, x, random);
        }
        put_back(o.m, i, n, m, random, 0);
    }
}
