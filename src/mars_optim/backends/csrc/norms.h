// Sums of squares and products: short runs in the arithmetic's type, then double. Included once a level, inside its
// namespace.

// Lane j sums every kLanes-th element of a block from j on, so that lanes are vectors.
constexpr int kLanes = 32;
constexpr int kRun = kBlock / kLanes;

template <bool kPrev, class T, class P>
static void add_squares(const T* __restrict g, const P* __restrict prev, T a, T b, double* __restrict cc) {
    for (int j = 0; j < kLanes; ++j) {
        T sum = 0;
        for (int k = 0; k < kRun; ++k) {
            const T c = corrected<kPrev>(g, prev, j + k * kLanes, a, b);
            sum += c * c;
        }
        cc[j] += double(sum);
    }
}

// gg, gd and dd, kLanes of each.
template <class T, class P>
static void add_products(const T* __restrict g, const P* __restrict prev, double* __restrict sums) {
    for (int j = 0; j < kLanes; ++j) {
        T gg = 0, gd = 0, dd = 0;
        for (int k = 0; k < kRun; ++k) {
            const T gi = g[j + k * kLanes], d = gi - get<T>(prev, j + k * kLanes);
            gg += gi * gi;
            gd += gi * d;
            dd += d * d;
        }
        sums[j] += double(gg);
        sums[j + kLanes] += double(gd);
        sums[j + 2 * kLanes] += double(dd);
    }
}

template <class T, class P>
static void add_block(bool products, T a, T b, const T* g, const P* prev, double* lanes) {
    if (products && prev) add_products(g, prev, lanes);
    else if (prev) add_squares<true>(g, prev, a, b, lanes);
    else add_squares<false>(g, prev, products ? T(1) : a, b, lanes);
}

// What is left over of a block: zeros, which add nothing.
template <class T>
static const T* padded(const T* elements, int n, T* buffer) {
    if (!elements || n == kBlock) return elements;
    if (elements != buffer) std::memcpy(buffer, elements, size_t(n) * sizeof(T));
    std::memset(buffer + n, 0, size_t(kBlock - n) * sizeof(T));
    return buffer;
}

// (g.g, g.d, d.d) for kProducts, else (c.c, 0, 0).
template <class T>
static void measure(const Call& call, const Record& r, int64_t start, int64_t count, double* sums) {
    const Operands o(call, r);
    const bool products = call.op == kProducts;
    const bool has_prev = products || T(r.b) != 0;
    double lanes[3 * kLanes] = {};
    T g_buffer[kBlock], prev_buffer[kBlock];
    for (int64_t i = 0; i < count; i += kBlock) {
        const int n = int(count - i < kBlock ? count - i : kBlock);
        if (count - i >= kAhead + kBlock) {
            prefetch(o.g, start + i + kAhead);
            if (has_prev) prefetch(o.prev, start + i + kAhead);
        }
        const T* g = padded(view(o.g, start + i, n, g_buffer), n, g_buffer);
        if (n == kBlock && has_prev && o.prev.data && o.prev.format == kBF16) {
            add_block(products, T(r.a), T(r.b), g, at<const uint16_t>(o.prev, start + i), lanes);
            continue;
        }
        T* seen = has_prev ? view(o.prev, start + i, n, prev_buffer) : nullptr;
        add_block(products, T(r.a), T(r.b), g, padded<T>(seen, n, prev_buffer), lanes);
    }
    for (int k = 0; k < 3; ++k) {
        sums[k] = 0;
        for (int j = 0; j < kLanes; ++j) sums[k] += lanes[k * kLanes + j];
    }
}
