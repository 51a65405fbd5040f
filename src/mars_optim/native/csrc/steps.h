// The step, a block of elements at a time. Included once a level, inside its namespace.

// A call's and a record's numbers in the arithmetic's type.
template <class T>
struct Weights {
    T a, b, ratio, clip, beta1, rest1, beta2, rest2, eps, we, wg, decay, step_size, inv_sqrt_bias2;

    Weights(const Call& call, const Record& r, double clip_factor)
        : a(T(r.a)), b(T(r.b)), ratio(T(r.ratio)), clip(T(clip_factor)), beta1(T(call.beta1)), rest1(T(1 - call.beta1)),
          beta2(T(call.beta2)), rest2(T(1 - call.beta2)), eps(T(call.eps)), we(T(r.we)), wg(T(r.wg)),
          decay(T(r.decay)), step_size(T(r.step_size)), inv_sqrt_bias2(T(r.inv_sqrt_bias2)) {}
};

template <class T>
static inline T sign(T x) {
    return x > 0 ? T(1) : x < 0 ? T(-1) : x;  // zeros and nan are their own
}

// The part of AdamW's step that depends on the moments.
template <class T>
static inline T adamw_step(T m, T v, const Weights<T>& k) {
    return k.step_size * m / (std::sqrt(v) * k.inv_sqrt_bias2 + k.eps);
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

// Moments are stored as S, drawn if that is bf16, and the previous gradient as P. kKeep: g takes the place of g'.
template <bool kPrev, bool kMax, bool kKeep = false, class T, class P, class S>
static void adamw(int n, const Weights<T>& w, const T* __restrict g, P* __restrict prev, S* __restrict m,
                  S* __restrict v, T* __restrict vmax, T* __restrict x, uint32_t start = 0, uint32_t key = 0) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T gi = sizeof(S) == 2 ? quiet(g[i]) : g[i];
        const T c = k.clip * corrected<kPrev>(gi, prev, i, k.a, k.b, k.ratio);
        const T mi = k.beta1 * get<T>(m, i) + k.rest1 * c;
        const T vi = k.beta2 * get<T>(v, i) + k.rest2 * (c * c);
        const T top = kMax ? larger(vmax[i], vi) : vi;
        const uint32_t random = sizeof(S) == 2 ? random_bits(start + uint32_t(i), key) : 0;
        put(m, i, mi, random);
        put(v, i, vi, random >> 16);
        if (kMax) vmax[i] = top;
        if (kKeep) keep(prev, i, gi);
        x[i] = k.decay * x[i] - adamw_step(mi, top, k);
    }
}

template <bool kPrev, bool kOne, class T>
static void lion(int n, const Weights<T>& w, const T* __restrict g, const T* __restrict prev, T* __restrict m,
                 T* __restrict x) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = k.clip * corrected<kPrev>(g[i], prev, i, k.a, k.b, k.ratio);
        const T mi = k.beta1 * m[i] + k.rest1 * c;
        m[i] = mi;
        x[i] = k.decay * x[i] - k.step_size * sign(kOne ? k.we * mi + k.wg * g[i] : mi);
    }
}

template <bool kPrev, bool kOne, class T>
static void momentum(int n, const Weights<T>& w, const T* __restrict g, const T* __restrict prev, T* __restrict m,
                     T* __restrict out) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = k.clip * corrected<kPrev>(g[i], prev, i, k.a, k.b, k.ratio);
        const T mi = k.beta1 * m[i] + k.rest1 * c;
        m[i] = mi;
        out[i] = kOne ? k.we * mi + k.wg * g[i] : mi;
    }
}

template <class T>
static void descend(int n, const Weights<T>& w, const T* __restrict direction, T* __restrict x) {
    for (int i = 0; i < n; ++i) x[i] = w.decay * x[i] - w.step_size * direction[i];
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

// The state that one wants in bf16 takes a single loop: the passes above would cost more than its memory does.
static inline bool is_bf16_adamw(const Call& c, const Record& r) {
    constexpr int32_t kDrawn = kStochasticM | kStochasticV;
    return c.op == kAdamw && c.m_format == kBF16 && c.v_format == kBF16 && (!r.prev || c.prev_format == kBF16) &&
           (c.flags & (kDrawn | kAmsgrad)) == kDrawn;
}

static void bf16_adamw_block(const Call& call, const Record& r, const Operands& o, const Weights<float>& w,
                             int64_t start, int n) {
    float g_buffer[kBlock], x_buffer[kBlock];
    const float* g = view(o.g, start, n, g_buffer);
    float* x = load_x(call, r, start, n, x_buffer);
    const bool has_prev = r.prev && w.b != 0;
    uint16_t* prev = has_prev ? at<uint16_t>(o.prev, start) : nullptr;
    uint16_t* m = at<uint16_t>(o.m, start);
    uint16_t* v = at<uint16_t>(o.v, start);
    float* vmax = nullptr;
    const uint32_t first = uint32_t(start), key = uint32_t(r.key);
    const bool keeps = has_prev && r.next == r.prev;
    if (keeps) adamw<true, false, true>(n, w, g, prev, m, v, vmax, x, first, key);
    else if (has_prev) adamw<true, false>(n, w, g, prev, m, v, vmax, x, first, key);
    else adamw<false, false>(n, w, g, prev, m, v, vmax, x, first, key);
    store_x(call, r, start, n, x);
    if (o.next.data && !keeps) encode(o.next, start, n, g);
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

static inline void block(const Call& call, const Record& r, const Operands& o, const Weights<float>& w, int64_t start,
                         int n) {
    if (call.op == kDescend) descend_block(call, r, o, w, start, n);
    else if (is_bf16_adamw(call, r)) bf16_adamw_block(call, r, o, w, start, n);
    else step_block(call, r, o, w, start, n);
}

static inline void block(const Call& call, const Record& r, const Operands& o, const Weights<double>& w,
                         int64_t start, int n) {
    if (call.op == kDescend) descend_block(call, r, o, w, start, n);
    else step_block(call, r, o, w, start, n);
}

template <class T>
static void update(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Operands operands(call, r);
    const Weights<T> weights(call, r, clip);
    for (int64_t i = 0; i < count; i += kBlock) {
        if (count - i >= kAhead + kBlock) prefetch_step(operands, start + i + kAhead);
        block(call, r, operands, weights, start + i, int(count - i < kBlock ? count - i : kBlock));
    }
}

template <class T>
static int32_t advance(const Call& call, const Record& r, int64_t start, int64_t count, double limit, double* square) {
    const Operands operands(call, r);
    const Weights<T> weights(call, r, 1.0);
    double lanes[kLanes] = {};
    T buffer[kBlock];
    int64_t done = 0;
    for (int64_t tile = 0; tile < count; tile += kAhead) {
        const int64_t end = tile + kAhead < count ? tile + kAhead : count;
        for (int64_t i = tile; i < end; i += kBlock) {
            if (count - i >= kAhead + kBlock) prefetch(operands.g, start + i + kAhead);
            const int n = int(end - i < kBlock ? end - i : kBlock);
            const T* g = padded(at<const T>(operands.g, start + i), n, buffer);
            add_squares<false>(g, static_cast<const T*>(nullptr), T(1), T(0), T(0), lanes);
        }
        if (!(sum_of(lanes) <= limit)) continue;  // nor will it be further on
        for (int64_t i = tile; i < end; i += kBlock) {
            if (count - i >= kAhead + kBlock) prefetch_step(operands, start + i + kAhead);
            block(call, r, operands, weights, start + i, int(end - i < kBlock ? end - i : kBlock));
        }
        done = end;
    }
    *square = sum_of(lanes);
    return int32_t(done);
}

// The two steps again, from what they left with clip = 1: takes c's part away and adds the clipped one. What was there
// before c comes back to within the rounding of the sum, and exactly where it was 0.
template <class T>
static void amend_adamw(int n, const Weights<T>& w, const T* __restrict g, const T* __restrict prev, T* __restrict m,
                        T* __restrict v, T* __restrict x) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = corrected<true>(g[i], prev, i, k.a, k.b, k.ratio), clipped = k.clip * c;
        const T mi = (m[i] - k.rest1 * c) + k.rest1 * clipped;
        const T vi = (v[i] - k.rest2 * (c * c)) + k.rest2 * (clipped * clipped);  // sums round to no less than a summand
        x[i] += adamw_step(m[i], v[i], k) - adamw_step(mi, vi, k);
        m[i] = mi;
        v[i] = vi;
    }
}

template <class T>
static void amend_lion(int n, const Weights<T>& w, const T* __restrict g, const T* __restrict prev, T* __restrict m,
                       T* __restrict x) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = corrected<true>(g[i], prev, i, k.a, k.b, k.ratio);
        const T mi = (m[i] - k.rest1 * c) + k.rest1 * (k.clip * c);
        x[i] += k.step_size * (sign(m[i]) - sign(mi));
        m[i] = mi;
    }
}

// Everything stored as T.
template <class T>
static void amend(const Call& call, const Record& r, int64_t start, int64_t count, double clip) {
    const Weights<T> weights(call, r, clip);
    const T* g = static_cast<const T*>(r.g) + start;
    const T* prev = static_cast<const T*>(r.prev) + start;
    T* m = static_cast<T*>(r.m) + start;
    T* x = static_cast<T*>(r.x) + start;
    if (call.op == kAdamw) amend_adamw(int(count), weights, g, prev, m, static_cast<T*>(r.v) + start, x);
    else amend_lion(int(count), weights, g, prev, m, x);
}
