// The step, a block of elements at a time: for any formats, since what is not stored as T passes through buffers. Included
// once a level, inside its namespace.

// A call's and a record's numbers in the arithmetic's type. a and b have the clip factor in them; like ratio, which gradients
// may have made, they can be any nan.
template <class T>
struct Weights {
    T a, b, ratio, beta1, rest1, beta2, rest2, eps, we, wg, decay, step_size, inv_sqrt_bias2;

    Weights(const Call& call, const Record& r, double clip)
        : a(quiet<true>(T(clip * r.a))), b(quiet<true>(T(clip * r.b))), ratio(quiet<true>(T(r.ratio))),
          beta1(T(call.beta1)), rest1(T(1 - call.beta1)), beta2(T(call.beta2)), rest2(T(1 - call.beta2)),
          eps(T(call.eps)), we(T(r.we)), wg(T(r.wg)), decay(T(r.decay)), step_size(T(r.step_size)),
          inv_sqrt_bias2(T(r.inv_sqrt_bias2)) {}
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
static inline void keep(T* next, int i, T g) { next[i] = g; }
static inline void keep(uint16_t* next, int i, float g) {
    next[i] = Bf16::round_quiet(g, 0x7fff + ((bits_of(g) >> 16) & 1));
}

template <class T>
static inline T larger(T x, T y) {
    return x >= y || x != x ? x : y;  // nan if either is
}

// Moments are stored as S, drawn if that is bf16, and the previous gradient as P. kKeep: g is stored like it in `next`, and
// a nan of either has room for random bits. No two of the arrays overlap.
template <bool kPrev, bool kMax, bool kKeep = false, class T, class P, class S>
MARS_INLINE void adamw(int n, const Weights<T>& k, const T* __restrict g, const P* __restrict prev, P* __restrict next,
                       S* __restrict m, S* __restrict v, T* __restrict vmax, T* __restrict x, uint32_t random = 0) {
    MARS_IVDEP
    for (int i = 0; i < n; ++i) {
        const T gi = quiet<kKeep>(g[i]);
        const T c = quiet<sizeof(S) == 2 && !kKeep>(corrected<kPrev>(gi, prev, i, k.a, k.b, k.ratio));
        const T mi = first_moment(get<T>(m, i), c, k);
        const T vi = second_moment(get<T>(v, i), c, k);
        const T top = kMax ? larger(vmax[i], vi) : vi;
        put(m, i, mi, random);
        put(v, i, vi, random >> 16);
        random += kGolden;
        if (kMax) vmax[i] = top;
        if (kKeep) keep(next, i, gi);
        x[i] = fused(k.decay, x[i], -adamw_step(mi, top, k));
    }
}

template <bool kPrev, bool kOne, bool kKeep = false, class T, class P, class S>
MARS_INLINE void lion(int n, const Weights<T>& k, const T* __restrict g, const P* __restrict prev, P* __restrict next,
                      S* __restrict m, T* __restrict x, uint32_t random = 0) {
    MARS_IVDEP
    for (int i = 0; i < n; ++i) {
        const T gi = quiet<kKeep>(g[i]);
        const T c = quiet<sizeof(S) == 2 && !kKeep>(corrected<kPrev>(gi, prev, i, k.a, k.b, k.ratio));
        const T mi = first_moment(get<T>(m, i), c, k);
        put(m, i, mi, random);
        random += kGolden;
        if (kKeep) keep(next, i, gi);
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
static void step_block(const Call& call, const Record& r, const Operands& o, const Weights<T>& weights, int64_t start,
                       int n) {
    const Weights<T> w = weights;  // nobody else's memory, or loops would read it anew for each element
    T g_buffer[kBlock], prev_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock], x_buffer[kBlock];
    const bool one_buffer = call.flags & kOneBuffer;
    const T* g = view(o.g, start, n, g_buffer);
    T* const no_next = nullptr;
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
            MARS_DISPATCH(adamw, prev, amsgrad, n, w, g, prev, no_next, m, v, vmax, x);
            put_back(o.v, start, n, v, call.flags & kStochasticV ? random : nullptr, 16);
            if (amsgrad) put_back(o.vmax, start, n, vmax);
        } else {
            MARS_DISPATCH(lion, prev, one_buffer, n, w, g, prev, no_next, m, x);
        }
        store_x(call, r, start, n, x);
    }
    put_back(o.m, start, n, m, call.flags & kStochasticM ? random : nullptr, 0);
    if (o.next.data) encode(o.next, start, n, g);  // last: prev may be the same memory
}

template <class T>
static void descend_block(const Call& call, const Record& r, const Operands& o, const Weights<T>& w, int64_t start,
                          int n) {
    T out_buffer[kBlock], x_buffer[kBlock];
    T* x = load_x(call, r, start, n, x_buffer);
    descend(n, w, view(o.out, start, n, out_buffer), x);
    store_x(call, r, start, n, x);
}
