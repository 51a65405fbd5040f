// Sums of squares and products, in double: neither do squares of large numbers overflow, nor is anything lost that the
// weights s and kappa could magnify. Included once a level, inside its namespace.

// Lane j sums every kLine-th element of a block from j on, so that lanes are vectors.
constexpr int kRun = kBlock / kLine;

template <bool kPrev, class T, class P>
static void add_squares(const T* __restrict g, const P* __restrict prev, T a, T b, T ratio, double* __restrict cc) {
    for (int j = 0; j < kLine; ++j) {
        double sum = 0;
        for (int k = 0; k < kRun; ++k) {
            const double c = double(corrected<kPrev>(g[j + k * kLine], prev, j + k * kLine, a, b, ratio));
            sum = fused(c, c, sum);
        }
        cc[j] += sum;
    }
}

// g.g, g.g' and g'.g', kLine of each.
template <class T, class P>
static void add_products(const T* __restrict g, const P* __restrict prev, double* __restrict sums) {
    for (int j = 0; j < kLine; ++j) {
        double gg = 0, go = 0, oo = 0;
        for (int k = 0; k < kRun; ++k) {
            const double gi = double(g[j + k * kLine]), other = double(get<T>(prev, j + k * kLine));
            gg = fused(gi, gi, gg);
            go = fused(gi, other, go);
            oo = fused(other, other, oo);
        }
        sums[j] += gg;
        sums[j + kLine] += go;
        sums[j + 2 * kLine] += oo;
    }
}

template <class T, class P>
static void add_block(bool products, const Record& r, const T* g, const P* prev, double* lanes) {
    const T a = products ? T(1) : T(r.a), b = T(r.b), ratio = T(r.ratio);
    if (products && prev) add_products(g, prev, lanes);
    else if (prev) add_squares<true>(g, prev, a, b, ratio, lanes);
    else add_squares<false>(g, prev, a, b, ratio, lanes);
}

// What is left over of a block: zeros, which add nothing.
template <class T>
static const T* padded(const T* elements, int n, T* buffer) {
    if (!elements || n == kBlock) return elements;
    if (elements != buffer) std::memcpy(buffer, elements, size_t(n) * sizeof(T));
    std::memset(buffer + n, 0, size_t(kBlock - n) * sizeof(T));
    return buffer;
}

// In pairs: a chain of additions would take longer than the products. Lanes added up are gone.
template <int kHalf = kLine / 2, class T>
static inline T sum_of(T* lanes) {
    for (int j = 0; j < kHalf; ++j) lanes[j] += lanes[j + kHalf];
    if constexpr (kHalf > 1) return sum_of<kHalf / 2>(lanes);
    return lanes[0];
}

// Upper bounds of g.g, no more than 2e-4 above it, or 1e-37 an element: summed as T, a fraction of the work, where
// nothing is too large for that. In fp32 a lane's sum of 2^10 squares, of 2^15 elements, can be 2^-14 too small.
template <class T>
static double bound_of_sum(T* squares, const T* g, int n) {
    double sum = double(sum_of(squares));
    if (sum > 1e38) {  // some may have become infinite
        sum = 0;
        for (int i = 0; i < n; ++i) sum += double(g[i]) * double(g[i]);
    }
    return sum * (1 + 1e-4) + 1e-37 * n;
}

template <class T>
static double bound_of_squares(const T* g, int n) {
    T squares[kLine] = {};
    int i = 0;
    for (; i + kLine <= n; i += kLine)
        for (int j = 0; j < kLine; ++j) squares[j] = fused(g[i + j], g[i + j], squares[j]);
    for (int j = 0; i < n; ++i, ++j) squares[j] = fused(g[i], g[i], squares[j]);
    return bound_of_sum(squares, g, n);
}

// (g.g, g.g', g'.g') for kProducts, else (c.c, 0, 0).
template <class T>
static void measure(const Call& call, const Record& r, int64_t start, int64_t count, double* sums) {
    const Operands o(call, r);
    const bool products = call.op == kProducts;
    const bool has_prev = products || T(r.b) != 0;
    double lanes[3 * kLine] = {};
    T g_buffer[kBlock], prev_buffer[kBlock];
    for (int64_t i = 0; i < count; i += kBlock) {
        const int n = int(count - i < kBlock ? count - i : kBlock);
        if (count - i >= kFar + kBlock) {
            prefetch(o.g, start + i + kFar);
            if (has_prev) prefetch(o.prev, start + i + kFar);
        }
        const T* g = padded(view(o.g, start + i, n, g_buffer), n, g_buffer);
        if (n == kBlock && has_prev && o.prev.data && o.prev.format == kBF16) {
            add_block(products, r, g, at<const uint16_t>(o.prev, start + i), lanes);
            continue;
        }
        T* seen = has_prev ? view(o.prev, start + i, n, prev_buffer) : nullptr;
        add_block(products, r, g, padded<T>(seen, n, prev_buffer), lanes);
    }
    for (int k = 0; k < 3; ++k) sums[k] = sum_of(lanes + k * kLine);
}
