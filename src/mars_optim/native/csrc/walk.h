// The step where its operands are, in the usual formats: one loop, whose requests to memory and arithmetic take turns.
// Included once a level, inside its namespace.

// Asks for the line that many elements further on.
template <class P>
static inline void ask(const P* line, int ahead) {
    const char* address = reinterpret_cast<const char*>(line) + ahead * int(sizeof(P));
    for (int i = 0; i < kLine * int(sizeof(P)); i += 64) MARS_PREFETCH(address + i);
}

// Stores a line; past the cache where it is nothing that the step has read, for nobody will read it before the next.
static inline void put_line(const uint16_t* line, uint16_t* out, bool past_cache) {
#ifdef MARS_HAS_STREAM
    for (int i = 0; past_cache && i < kLine; i += 8) {
        const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(line + i));
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), eight);
    }
    if (past_cache) return;
#endif
    (void)past_cache;
    std::memcpy(out, line, kLine * sizeof(uint16_t));
}

// Of what was stored past the cache, everything is there for other threads.
static inline void settle_lines() {
#ifdef MARS_HAS_STREAM
    _mm_sfence();
#endif
}

// Adds a line's squares to the lanes' sums; whether all of these are within the limit.
template <class T>
MARS_INLINE bool add_line(int n, const T* __restrict g, T limit, T* __restrict sums) {
    MARS_IVDEP
    for (int j = 0; j < n; ++j) sums[j] = fused(g[j], g[j], sums[j]);
    int32_t beyond = 0;
    MARS_IVDEP
    for (int j = 0; j < n; ++j) beyond |= sums[j] <= limit ? 0 : -1;
    return !beyond;
}

// The step where the moments, g' and the next g' are, stored as S and P; returns how many elements have taken it. Operands
// are asked for line by line, so that memory has something to do all the time. kCounts: `squares` gets the lanes' sums of
// g.g; where a line takes one of them beyond the limit the walk ends before it.
template <bool kIsAdamw, bool kPrev, bool kOne, bool kKeep, bool kCounts, class T, class P, class S>
static int walk(int n, const Weights<T>& w, const T* g, const P* prev, P* next, S* m, S* v, T* x, uint32_t random,
                T limit, T* squares) {
    constexpr int kAhead = sizeof(S) == 2 || sizeof(P) == 2 ? 2 * kBlock : kBlock;
    const Weights<T> k = w;
    const bool past_cache = kKeep && next != prev && reinterpret_cast<uintptr_t>(next) % 16 == 0;
    T* const no_vmax = nullptr;
    alignas(64) P kept[kLine];
    alignas(64) T sums[kLine] = {};
    int i = 0;
    for (; i + kLine <= n; i += kLine, random += kLine * kGolden) {
        ask(g + i, kAhead);
        ask(x + i, kAhead);
        ask(m + i, kAhead);
        if (kIsAdamw) ask(v + i, kAhead);
        if (kPrev) ask(prev + i, kAhead);
        if (kCounts && !add_line(kLine, g + i, limit, sums)) break;
        const P* const before = kPrev ? prev + i : prev;
        if (kIsAdamw) adamw<kPrev, false, kKeep>(kLine, k, g + i, before, kept, m + i, v + i, no_vmax, x + i, random);
        else lion<kPrev, kOne, kKeep>(kLine, k, g + i, before, kept, m + i, x + i, random);
        if constexpr (kKeep) put_line(kept, next + i, past_cache);
    }
    const int rest = n - i;
    if (rest < kLine && (!kCounts || add_line(rest, g + i, limit, sums))) {
        const P* const before = kPrev ? prev + i : prev;
        if (kIsAdamw) adamw<kPrev, false, kKeep>(rest, k, g + i, before, kept, m + i, v + i, no_vmax, x + i, random);
        else lion<kPrev, kOne, kKeep>(rest, k, g + i, before, kept, m + i, x + i, random);
        if (kKeep) std::memcpy(next + i, kept, size_t(rest) * sizeof(P));
        i = n;
    }
    if (kCounts) std::memcpy(squares, sums, sizeof sums);
    return i;
}

// Whether g is kept as the step is taken, not after it.
static inline bool keeps_within(const Call& c, const Record& r) { return r.next && r.prev && c.prev_format == kBF16; }

// The instance of `walk` for a call and a record. With `squares` it counts.
template <class T, class P, class S>
static int walk_as(const Call& c, const Record& r, int n, const Weights<T>& w, const T* g, const P* prev, P* next, S* m,
                   S* v, T* x, uint32_t random, T limit, T* squares) {
    const bool is_adamw = c.op == kAdamw, keeps = w.b != 0 && keeps_within(c, r);
    const bool has_prev = w.b != 0 && prev, is_one = c.flags & kOneBuffer;
    constexpr bool kMayKeep = sizeof(P) == sizeof(uint16_t);
#define MARS_WALK(kPrev, kOne, kKeep, kCounts) \
    (is_adamw ? walk<true, kPrev, false, kKeep, kCounts>(n, w, g, prev, next, m, v, x, random, limit, squares) \
              : walk<false, kPrev, kOne, kKeep, kCounts>(n, w, g, prev, next, m, v, x, random, limit, squares))
    if (!has_prev) return is_one ? MARS_WALK(false, true, false, false) : MARS_WALK(false, false, false, false);
    if (squares) return keeps ? MARS_WALK(true, false, kMayKeep, true) : MARS_WALK(true, false, false, true);
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

// A block where weights or gradients pass through buffers, else any length.
template <class T>
static int walk_from(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start, int n,
                     T limit = 0, T* squares = nullptr) {
    T g_buffer[kBlock], x_buffer[kBlock];
    const T* g = view(o.g, start, n, g_buffer);
    T* x = load_x(call, r, start, n, x_buffer);
    const uint32_t random = start_of(uint32_t(r.key)) + uint32_t(start) * kGolden;
    const auto walk_over = [&](auto* prev, auto* m, auto* v) {
        auto* next = static_cast<decltype(prev)>(r.next);
        return walk_as(call, r, n, w, g, prev ? prev + start : prev, next ? next + start : next, m + start,
                       v ? v + start : v, x, random, limit, squares);
    };
    const auto walk_by = [&](auto* m) {
        auto* v = static_cast<decltype(m)>(r.v);
        void* prev = const_cast<void*>(r.prev);
        if (sizeof(T) == sizeof(float) && call.prev_format == kBF16) return walk_over(static_cast<uint16_t*>(prev), m, v);
        return walk_over(static_cast<T*>(prev), m, v);
    };
    const bool is_narrow = sizeof(T) == sizeof(float) && call.m_format == kBF16;
    const int done = is_narrow ? walk_by(static_cast<uint16_t*>(r.m)) : walk_by(static_cast<T*>(r.m));
    store_x(call, r, start, n, x);
    if (o.next.data && !(w.b != 0 && keeps_within(call, r))) encode(o.next, start, done, g);
    return done;
}

static inline void prefetch_step(const Operands& o, int64_t start) {
    prefetch(o.x, start);
    prefetch(o.g, start);
    prefetch(o.prev, start);
    prefetch(o.m, start);
    prefetch(o.v, start);
    prefetch(o.out, start);
}

template <class T>
static void update(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Operands o(call, r);
    const Weights<T> w(call, r, clip);
    const bool in_place = is_in_place<T>(call, r);
    // g is copied while the cache has it.
    const int64_t length = !is_direct<T>(call, r) ? kBlock : o.next.data && !keeps_within(call, r) ? kFar : count;
    for (int64_t i = start; i < start + count; i += length) {
        const int n = int(start + count - i < length ? start + count - i : length);
        if (length == kBlock && r.n - i >= kFar + kBlock) prefetch_step(o, i + kFar);
        if (call.op == kDescend) descend_block(call, r, o, w, i, n);
        else if (in_place) walk_from(call, r, o, w, i, n);
        else step_block(call, r, o, w, i, n);
    }
    if (keeps_within(call, r)) settle_lines();
}
