// The step where its operands are, in the usual formats: one loop, whose requests to memory and arithmetic take turns.
// Included once a level, inside its namespace.

// What a walk works through at a time: a line of memory in bf16, two in fp32.
constexpr int kLine = 32;

// Asks for the line a block further on.
template <class P>
static inline void ask(const P* line) {
    const char* address = reinterpret_cast<const char*>(line) + kBlock * sizeof(P);
    for (int i = 0; i < kLine * int(sizeof(P)); i += 64) MARS_PREFETCH(address + i);
}

// Copies a line past the cache: nobody will read it but in the rare case.
static inline void put_aside(const uint16_t* in, uint16_t* out) {
#ifdef MARS_HAS_STREAM
    for (int i = 0; i < kLine; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), eight);
    }
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

// The step where the moments and g' are, stored as S and P. Operands are asked for line by line, so that memory has
// something to do all the time. The tile to come lies `ahead`; there may be none, then that is 0.
template <bool kIsAdamw, bool kPrev, bool kOne, bool kKeep, bool kBeside, class T, class P, class S>
static void walk(int n, int64_t ahead, const Weights<T>& w, const T* g, P* prev, S* m, S* v, T* x, uint32_t random,
                 const Beside<T>& beside) {
    const Weights<T> k = w;
    T* const no_vmax = nullptr;
    T squares[kLine] = {};
    int i = 0;
    for (; i + kLine <= n; i += kLine, random += kLine * kGolden) {
        ask(kBeside ? g + i + ahead : g + i);
        ask(x + i);
        ask(m + i);
        if (kIsAdamw) ask(v + i);
        if (kPrev) ask(prev + i);
        if (kBeside)
            for (int j = 0; j < kLine; ++j) squares[j] = fused(g[i + ahead + j], g[i + ahead + j], squares[j]);
        if (kBeside && kKeep) put_aside(prev + i, beside.journal + i);
        P* const before = kPrev ? prev + i : prev;
        if (kIsAdamw) adamw<kPrev, false, kKeep>(kLine, k, g + i, before, m + i, v + i, no_vmax, x + i, random);
        else lion<kPrev, kOne, kKeep>(kLine, k, g + i, before, m + i, x + i, random);
    }
    P* const before = kPrev ? prev + i : prev;
    if (kBeside && kKeep) std::memcpy(beside.journal + i, before, size_t(n - i) * sizeof(uint16_t));
    if (kIsAdamw) adamw<kPrev, false, kKeep>(n - i, k, g + i, before, m + i, v + i, no_vmax, x + i, random);
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
    const bool has_prev = w.b != 0 && prev, is_one = c.flags & kOneBuffer;
    constexpr bool kMayKeep = sizeof(P) == sizeof(uint16_t);
    const Beside<T> nothing{};
#define MARS_WALK(kPrev, kOne, kKeep, kBeside) \
    (is_adamw ? walk<true, kPrev, false, kKeep, kBeside>(n, ahead, w, g, prev, m, v, x, random, kBeside ? *beside : nothing) \
              : walk<false, kPrev, kOne, kKeep, kBeside>(n, ahead, w, g, prev, m, v, x, random, kBeside ? *beside : nothing))
    if (!has_prev) return is_one ? MARS_WALK(false, true, false, false) : MARS_WALK(false, false, false, false);
    if (beside) return keeps ? MARS_WALK(true, false, kMayKeep, true) : MARS_WALK(true, false, false, true);
    return keeps ? MARS_WALK(true, false, kMayKeep, false) : MARS_WALK(true, false, false, false);
#undef MARS_WALK
}

// Whether the step can be taken where moments and g' are: the usual formats, in one loop.
template <class T>
static inline bool is_in_place(const Call& c, const Record& r) {
    const auto is_usual = [](int32_t format) {
        return format == kNative<T> || (sizeof(T) == sizeof(float) && format == kBF16);
    };
    const int32_t draws = kStochasticM | (c.op == kAdamw ? kStochasticV : 0);
    const bool is_drawn = c.m_format == kNative<T> || (c.flags & draws) == draws;
    const bool has_v = c.op == kLion || (c.op == kAdamw && c.v_format == c.m_format && !(c.flags & kAmsgrad));
    const bool has_prev = !r.prev || (!(c.flags & kOneBuffer) && is_usual(c.prev_format));
    return has_v && is_usual(c.m_format) && is_drawn && has_prev;
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

static inline void prefetch_step(const Operands& o, int64_t start) {
    prefetch(o.x, start);
    prefetch(o.g, start);
    prefetch(o.prev, start);
    prefetch(o.m, start);
    prefetch(o.v, start);
    prefetch(o.out, start);
}

// At most a tile.
template <class T>
static inline void step_tile(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start,
                             int n, const Beside<T>* beside = nullptr) {
    const bool direct = is_direct<T>(call, r);
    if (direct) return walk_block(call, r, o, w, start, n, r.n - start >= 2 * kTile ? kTile : 0, beside);
    for (int64_t i = start; i < start + n; i += kBlock) {
        const int length = int(start + n - i < kBlock ? start + n - i : kBlock);
        if (r.n - i >= kTile + kBlock) prefetch_step(o, i + kTile);
        if (call.op == kDescend) descend_block(call, r, o, w, i, length);
        else if (is_in_place<T>(call, r)) walk_block(call, r, o, w, i, length, 0, beside);
        else step_block(call, r, o, w, i, length);
    }
}

template <class T>
static void update(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Operands operands(call, r);
    const Weights<T> weights(call, r, clip);
    for (int64_t i = 0; i < count; i += kTile)
        step_tile(call, r, operands, weights, start + i, int(count - i < kTile ? count - i : kTile));
}
