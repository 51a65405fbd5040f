// Updates before the norm is known, and what becomes of them where c has to be clipped in the end. Included once a level,
// inside its namespace.

// What an update needs can be had again: g stays, so does g', and weights are stored as precisely as they are computed.
template <class T>
static bool can_advance(const Call& c, const Record& r) {
    return is_direct<T>(c, r) && r.prev && T(r.b) != 0 && r.next != r.prev;
}

template <class T>
static int32_t advance(const Call& call, const Record& r, int64_t start, int64_t count, double limit, double* square) {
    T squares[kLine];
    const Operands operands(call, r);
    const Weights<T> weights(call, r, 1.0);
    const int32_t done = walk_from(call, r, operands, weights, start, int(count), T(limit), squares);
    if (keeps_within(call, r)) settle_lines();
    const T* g = static_cast<const T*>(r.g) + start;
    const int64_t counted = done + kLine < count ? done + kLine : count;
    *square = bound_of_sum(squares, g, int(counted)) + bound_of_squares(g + counted, int(count - counted));
    return done;
}

// What a moment of x is once it has been stored.
template <bool kNarrow, class T>
static inline T once_stored(T x, uint32_t random) {
    return kNarrow ? T(Bf16::widen(Bf16::round(float(x), random & 0xffff))) : x;
}

// The two steps again, from what they left with clip = 1: takes c's part away and adds the clipped one. What was there
// before c comes back to within the rounding of what is stored, and exactly where it was 0. Of a v that has sunk in that
// rounding a spacing is left, more rather than less, for m is divided by its root. kNarrow: moments were drawn, as bf16.
template <bool kNarrow, class T>
static void amend_adamw(int n, const Weights<T>& w, T clip, const T* __restrict g, const T* __restrict prev,
                        T* __restrict m, T* __restrict v, T* __restrict x, const uint32_t* __restrict random) {
    const Weights<T> k = w;
    for (int i = 0; i < n; ++i) {
        const T c = corrected<true>(g[i], prev, i, k.a, k.b, k.ratio), clipped = clip * c;
        const T of_m = k.rest1 * c, of_v = k.rest2 * (c * c);
        const bool was_0 =
            m[i] == once_stored<kNarrow>(of_m, random[i]) && v[i] == once_stored<kNarrow>(of_v, random[i] >> 16);
        const T spacing = v[i] * T(kNarrow ? 0x1p-7 : sizeof(T) == sizeof(float) ? 0x1p-23 : 0x1p-52);
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
