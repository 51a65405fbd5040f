// Drives every operation, format, rounding and level over odd sizes, unaligned and empty tensors, from memory that ends
// where the operands end, so that the sanitizers see any step beyond it. Built and run by sanitize.py.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include <sys/mman.h>

#include "abi.h"

extern "C" int32_t mars_isa_levels();
extern "C" int32_t mars_run(int32_t isa, const mars::Call*, const mars::Record*, int64_t count, double* sums,
                            uint8_t* has_begun);

extern "C" int32_t mars_product_formats();
extern "C" int32_t mars_product(const mars::Product*);

using namespace mars;

static const int64_t kSizes[] = {0, 1, 7, 127, 128, 129, 255, 257, 1000, 33000};
static const int kNumSizes = int(sizeof kSizes / sizeof *kSizes);

// Exactly n elements on the heap, one element away from where malloc aligns.
class Memory {
public:
    Memory(int64_t n, int size) : bytes_(static_cast<char*>(std::malloc(size_t((n + 1) * size)))), size_(size), n_(n) {
        std::memset(bytes_, 0, size_t((n + 1) * size));
    }
    Memory(const Memory&) = delete;
    ~Memory() { std::free(bytes_); }
    char* data() const { return bytes_ + size_; }

    void fill(int32_t format) const {
        for (int64_t i = 0; i < n_; ++i) {
            const float x = i % 97 == 5 ? std::numeric_limits<float>::infinity() : i % 89 == 6 ? std::nanf("") : 1e-3f * float(i % 31);
            if (format == kF32) reinterpret_cast<float*>(data())[i] = x;
            else if (format == kF64) reinterpret_cast<double*>(data())[i] = x;
            else std::memset(data() + i * size_, int(i * 37), size_t(size_));
        }
    }

    // Small numbers, then an infinity: what was updated on the strength of the first has to be amended.
    void surprise(int32_t format) const {
        for (int64_t i = 0; i < n_; ++i) {
            const float x = i + 1 < n_ ? 1e-4f : std::numeric_limits<float>::infinity();
            if (format == kF32) reinterpret_cast<float*>(data())[i] = x;
            if (format == kF64) reinterpret_cast<double*>(data())[i] = x;
        }
    }

private:
    char* bytes_;
    int size_;
    int64_t n_;
};

static int size_of(int32_t format) { return format == kF64 ? 8 : format == kF32 ? 4 : format == kQ8 ? 1 : 2; }

// All operands of one tensor.
struct Tensor {
    Memory x, extra, g, prev, prev_scale, m, m_scale, v, v_scale, vmax, vmax_scale, out;

    Tensor(const Call& c, int64_t n)
        : x(n, size_of(c.x_format)), extra(n, c.rounding == kRemainder8 ? 1 : 2), g(n, size_of(c.g_format)),
          prev(n, size_of(c.prev_format)), prev_scale((n + 127) / 128, 4), m(n, size_of(c.m_format)),
          m_scale((n + 127) / 128, 4), v(n, size_of(c.v_format)), v_scale((n + 127) / 128, 4),
          vmax(n, size_of(c.v_format)), vmax_scale((n + 127) / 128, 4), out(n, size_of(c.out_format)) {
        x.fill(c.x_format), g.fill(c.g_format), prev.fill(c.prev_format), m.fill(c.m_format), v.fill(c.v_format);
        prev_scale.fill(kF32), m_scale.fill(kF32), v_scale.fill(kF32), vmax_scale.fill(kF32), out.fill(c.out_format);
    }

    Record record(int64_t n) const {
        auto scales = [](const Memory& memory) { return reinterpret_cast<float*>(memory.data()); };
        return {n, x.data(), extra.data(), g.data(), prev.data(), scales(prev_scale), prev.data(), scales(prev_scale),
                m.data(), scales(m_scale), v.data(), scales(v_scale), vmax.data(), scales(vmax_scale), out.data(),
                0xfedcba9876543210u, 0.9, 0.3, 0.7, 0.8, 0.1, 0.99, 1e-2, 2.0, HUGE_VAL, n % 2 ? HUGE_VAL : 0.1};
    }
};

static std::atomic<long> calls{0};

static void drive(const Call& call, int32_t isa) {
    std::vector<Tensor*> tensors;
    std::vector<Record> records;
    for (int64_t n : kSizes) {
        tensors.push_back(new Tensor(call, n));
        records.push_back(tensors.back()->record(n));
        if (n != 33000) continue;
        if (call.prev_format != kBF16) records.back().next = nullptr;
        tensors.back()->g.surprise(call.g_format);
    }
    std::vector<double> sums(3 * kNumSizes);
    if (mars_run(isa, &call, records.data(), kNumSizes, call.op == kProducts ? sums.data() : nullptr, nullptr) != kOk) {
        std::fprintf(stderr, "refused: op %d, x %d, m %d, rounding %d\n", call.op, call.x_format, call.m_format, call.rounding);
        std::exit(1);
    }
    for (Tensor* tensor : tensors) delete tensor;
    ++calls;
}

static void drive_operation(int32_t isa, int32_t op, int num_threads) {
    for (int32_t x : {kF32, kF64, kBF16, kF16})
        for (int32_t state : {kF32, kF64, kBF16, kF16, kQ8})
            for (int32_t rounding = 0; rounding < kNumRoundings; ++rounding)
                for (int32_t flags : {0, kOneBuffer | kAmsgrad, kStochasticM | kStochasticV, 15}) {
                    const bool is_narrow = x == kBF16 || x == kF16;
                    if ((state == kF64 && x != kF64) || (rounding && !is_narrow)) continue;
                    const int32_t out = state == kQ8 ? kBF16 : state;
                    drive({op, x == kF64, x, x, state, state, state, out, rounding, flags, num_threads, 0, .9, .99, 1e-8, 1.0}, isa);
                }
}

// Tensors of a few sizes, all of them amended, whose next g' go where the g' of the tensor before of this size was.
static void drive_rotation(int32_t isa, int32_t op, int32_t moments, int num_threads) {
    const Call call{op, 0, kF32, kF32, kBF16, moments, moments, kF32, kNearest, kStochasticM | kStochasticV, num_threads, 0, .9, .99, 1e-8, 0.1};
    const int64_t sizes[] = {140000, 140000, 131072, 150002, 140000, 131072, 150002, 140000};
    std::vector<Tensor*> tensors;
    std::vector<Record> records;
    for (int64_t n : sizes) {
        tensors.push_back(new Tensor(call, n));
        float* g = reinterpret_cast<float*>(tensors.back()->g.data());
        for (int64_t i = 0; i < n; ++i) g[i] = 2.5e-4f;
        records.push_back(tensors.back()->record(n));
        records.back().prev_norm = records.size() % 3 ? 0.05 : HUGE_VAL;  // known to nobody: then c is measured first
    }
    for (int64_t n : {140000, 131072, 150002}) {
        tensors.push_back(new Tensor(call, n));
        void* next = tensors.back()->prev.data();
        for (size_t i = records.size(); i-- > 0;) {
            if (records[i].n != n) continue;
            records[i].next = next;
            next = const_cast<void*>(records[i].prev);
        }
    }
    uint8_t has_begun = 0;
    if (mars_run(isa, &call, records.data(), int64_t(records.size()), nullptr, &has_begun) != kOk || !has_begun) std::exit(1);
    for (Tensor* tensor : tensors) delete tensor;
    ++calls;
}

// Numbers that end where a page ends that nobody may touch: the sanitizers do not see what masked vectors read and write.
class Fenced {
public:
    explicit Fenced(size_t size) : size_((size + kPage - 1) / kPage * kPage + kPage) {
        memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (memory_ == MAP_FAILED || mprotect(memory_ + size_ - kPage, kPage, PROT_NONE)) std::exit(1);
        data_ = memory_ + size_ - kPage - size;
    }
    Fenced(const Fenced&) = delete;
    ~Fenced() { munmap(memory_, size_); }
    void* data() const { return data_; }

private:
    static constexpr size_t kPage = 65536;
    size_t size_;
    char *memory_, *data_;
};

static void drive_product(int32_t format, int64_t rows, int64_t columns, int64_t depth, int32_t flags, int32_t num_threads) {
    const size_t size = format == kF32 ? 4 : 2;
    const bool right_transposed = flags & kRightTransposed, out_transposed = flags & kOutTransposed;
    Fenced left(size * rows * depth), right(size * depth * columns), addend(size * rows * columns), out(size * rows * columns);
    const Product call{format, flags, num_threads, 0, rows, columns, depth, left.data(), right.data(),
                       num_threads % 2 ? addend.data() : nullptr, out.data(), depth, right_transposed ? depth : columns, columns,
                       out_transposed ? rows : columns, 1.0, 0.5};
    if (mars_product(&call) != kOk) {
        std::fprintf(stderr, "refused: a product of %ld x %ld x %ld, flags %d\n", long(rows), long(depth), long(columns), flags);
        std::exit(1);
    }
    ++calls;
}

static void drive_products(int32_t num_threads) {
    for (int32_t format : {kF32, kBF16}) {
        if (!(mars_product_formats() >> format & 1)) continue;
        for (int64_t depth : {0, 2, 30, 32, 34, 70})
            for (int64_t rows : {0, 1, 5, 6, 64, 71, 137})
                for (int64_t columns : {0, 1, 15, 16, 64, 71, 137})
                    for (int32_t flags = 0; flags < 8; ++flags) {
                        if ((flags & kTriangle) && (rows != columns || (flags & kOutTransposed))) continue;
                        drive_product(format, rows, columns, depth, flags, num_threads);
                    }
    }
}

// Two callers at once, more threads than cores.
static void drive_races(int32_t op) {
    const Call call{op, 0, kBF16, kBF16, kQ8, kQ8, kQ8, kBF16, kRemainder8, kStochasticM | kStochasticV, 4, 0, .9, .99, 1e-8, 1.0};
    auto work = [&call] {
        for (int i = 0; i < 20; ++i) drive(call, kBaseline);
        for (int32_t moments : {kF32, kBF16}) drive_rotation(kBaseline, call.op == kLion ? kLion : kAdamw, moments, 4);
    };
    std::thread other(work);
    work();
    other.join();
}

int main(int, char** arguments) {
    const bool races = arguments[1] && !std::strcmp(arguments[1], "races");
    for (int32_t op = 0; op < kNumOps; ++op) {
        if (races) drive_races(op);
        for (int32_t isa = 0; isa < kNumIsas && !races && (op == kAdamw || op == kLion); ++isa)
            for (int32_t moments : {kF32, kBF16})
                if (mars_isa_levels() >> isa & 1) drive_rotation(isa, op, moments, 3);
        for (int32_t isa = 0; isa < kNumIsas && !races; ++isa)
            if (mars_isa_levels() >> isa & 1) drive_operation(isa, op, 2);
    }
    if (races) {
        std::thread other(drive_products, 4);
        drive_products(3);
        other.join();
    } else for (int32_t num_threads : {1, 2, 5, 6}) drive_products(num_threads);
    std::printf("%ld calls\n", calls.load());
}
