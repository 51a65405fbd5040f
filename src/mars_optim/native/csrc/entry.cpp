// What the library exports: a call's work cut into tasks, whose size and order of summation do not depend on the number
// of threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "abi.h"
#include "pool.h"

namespace mars {
namespace {

constexpr int64_t kChunk = 32768;  // elements whose sums are added up by themselves; whole blocks of kQ8Block
static_assert(kChunk % kQ8Block == 0, "a scale belongs to one task");
constexpr int64_t kWindow = 1 << 17;  // elements measured before they are updated: g and g' of these stay in the cache
constexpr int64_t kSpan = 4;  // chunks a task: memory likes long runs
constexpr double kUsual = 16;  // times its share of ||g'||^2: a chunk's part of ||g||^2 that is nothing special

// What a tensor's clip factor takes: nothing, since a bound says 1; g alone, since the bound probably will; or all of c.
// kOnce: g alone, and each chunk is updated right after it was measured, as if the bound would do. Where in the end it does
// not, the chunks are amended. Chunks that promise trouble wait until the norm is known.
enum class Reads : uint8_t { kNothing, kOnce, kGradient, kAll };

struct Task {
    bool measures;
    int64_t tensor;
    int64_t begin, end;  // chunks
};

// Tensors that are measured one after the other, before any of them is updated.
struct Window {
    int64_t begin, end;
};

// One call's tensors, tasks and what they find.
class Plan {
public:
    Plan(const Call& call, const Record* records, int64_t count, const Kernels& kernels, double* sums)
        : call_(call), records_(records), count_(count), kernels_(kernels), sums_(sums),
          measures_(call.op == kProducts || (call.op != kDescend && call.clip_norm > 0)),
          first_(size_t(count) + 1), reads_(size_t(count), measures_ ? Reads::kAll : Reads::kNothing),
          window_(size_t(count)), reader_(size_t(count), -1), unfinished_(new std::atomic<int64_t>[size_t(count)]) {
        for (int64_t t = 0; t < count; ++t) {
            first_[size_t(t) + 1] = first_[size_t(t)] + chunks_of(t);
            unfinished_[size_t(t)].store((chunks_of(t) + kSpan - 1) / kSpan, std::memory_order_relaxed);
        }
        if (measures_) {
            partial_.resize(3 * size_t(first_.back()));
            clip_.resize(size_t(count), 1.0);
            num_updated_.resize(size_t(first_.back()));
            pending_.reset(new std::atomic<int64_t>[size_t(count)]);
            for (int64_t t = 0; t < count; ++t) {
                if (call.op != kProducts) reads_[size_t(t)] = reads(records[t]);
                const bool knows = reads_[size_t(t)] == Reads::kNothing;
                pending_[size_t(t)].store(knows ? kConcluded : chunks_of(t), std::memory_order_relaxed);
            }
        }
        if (sums) std::fill(sums, sums + 3 * count, 0.0);
        if (call.op == kProducts) {
            add_tasks(true, 0, count);
        } else {
            cut();
            find_readers();
            order();
        }
    }

    void run() {
        // All threads or one: OpenMP dismisses threads that a smaller team leaves over.
        int64_t elements = 0;
        for (int64_t t = 0; t < count_; ++t) elements += records_[t].n;
        const int num_threads = elements < 2 * kChunk ? 1 : call_.num_threads;
        run_parallel(num_threads, [](void* plan) { static_cast<Plan*>(plan)->work(); }, this);
    }

private:
    int64_t chunks_of(int64_t t) const { return (records_[t].n + kChunk - 1) / kChunk; }

    // The last window comes first: its gradients are what the cache may still hold of a pass before this call.
    void cut() {
        int64_t end = count_, elements = 0;
        for (int64_t t = count_; t-- > 0;) {
            elements += records_[t].n;
            window_[size_t(t)] = windows_.size();
            if (elements < kWindow && t > 0) continue;
            windows_.push_back({t, end});
            end = t;
            elements = 0;
        }
    }

    // Tensors whose g' others write over: they come in earlier windows.
    void find_readers() {
        std::vector<std::pair<const void*, int64_t>> readers;
        for (int64_t t = 0; t < count_; ++t)
            if (records_[t].prev) readers.emplace_back(records_[t].prev, t);
        std::sort(readers.begin(), readers.end());
        for (int64_t t = 0; t < count_; ++t) {
            const void* next = records_[t].next;
            if (!next || next == records_[t].prev) continue;
            const auto found = std::lower_bound(readers.begin(), readers.end(), std::make_pair(next, int64_t(0)));
            if (found == readers.end() || found->first != next) continue;
            reader_[size_t(t)] = found->second;
            if (window_[size_t(found->second)] >= window_[size_t(t)]) throw std::invalid_argument("next");
        }
    }

    // Whether one of this window's tensors writes over what the window before has yet to read.
    bool follows(size_t window) const {
        for (int64_t t = windows_[window].begin; t < windows_[window].end; ++t)
            if (reader_[size_t(t)] >= 0 && window_[size_t(reader_[size_t(t)])] + 1 == window) return true;
        return false;
    }

    // Of each window all tensors are measured, then updated from the last chunk to the first, since the last is the one
    // that the cache still holds. What tensors that are updated as they are measured have left to do comes one window
    // later, when nobody has to wait for a norm, unless that window has to wait for them.
    void order() {
        tasks_.reserve(size_t(first_.back()) * (measures_ ? 2 : 1));
        for (size_t w = 0; w <= windows_.size(); ++w) {
            const bool is_one = w < windows_.size(), waits = is_one && follows(w);
            if (waits) settle_window(w - 1);
            if (is_one) {
                add_tasks(true, windows_[w].begin, windows_[w].end);
                add_tasks(false, windows_[w].begin, windows_[w].end);
            }
            if (w > 0 && !waits) settle_window(w - 1);
        }
    }

    void settle_window(size_t w) {
        for (int64_t t = windows_[w].begin; t < windows_[w].end; ++t)
            if (reads_[size_t(t)] == Reads::kOnce) add_chunks(false, t);
    }

    // Measures tensors from the first chunk to the last, updates them from the last to the first.
    void add_tasks(bool measures, int64_t begin, int64_t end) {
        const size_t size = tasks_.size();
        const Reads without = measures ? Reads::kNothing : Reads::kOnce;
        for (int64_t t = begin; t < end; ++t)
            if (reads_[size_t(t)] != without) add_chunks(measures, t);
        if (!measures) std::reverse(tasks_.begin() + int64_t(size), tasks_.end());
    }

    void add_chunks(bool measures, int64_t t) {
        const int64_t chunks = chunks_of(t);
        for (int64_t c = 0; c < chunks; c += kSpan) tasks_.push_back({measures, t, c, std::min(c + kSpan, chunks)});
    }

    void work() {
        for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_.size();) {
            const Task& task = tasks_[i];
            await_reader(task.tensor);
            if (task.measures) {
                for (int64_t c = task.begin; c < task.end; ++c) measure(task.tensor, c);
                continue;
            }
            if (reads_[size_t(task.tensor)] == Reads::kOnce) {
                for (int64_t c = task.begin; c < task.end; ++c) settle(task.tensor, c, clip(task.tensor));
            } else {
                const Record& record = records_[task.tensor];
                const int64_t start = task.begin * kChunk, length = std::min(task.end * kChunk, record.n) - start;
                kernels_.update(call_, record, start, length, clip(task.tensor));
            }
            unfinished_[size_t(task.tensor)].fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    // Waits until nobody needs any more what this tensor writes over. All that takes comes before this task.
    void await_reader(int64_t t) {
        const int64_t reader = reader_[size_t(t)];
        if (reader < 0) return;
        while (unfinished_[size_t(reader)].load(std::memory_order_acquire) > 0) std::this_thread::yield();
    }

    // Mends what `advance` did too soon, and does what it has put off.
    void settle(int64_t t, int64_t chunk, double clip) {
        const Record& record = records_[t];
        const int64_t start = chunk * kChunk, length = std::min(kChunk, record.n - start), done = num_updated(t, chunk);
        if (clip != 1) kernels_.amend(call_, record, start, done, clip);
        kernels_.update(call_, record, start + done, length - done, clip);
    }

    int32_t& num_updated(int64_t t, int64_t chunk) { return num_updated_[size_t(first_[size_t(t)] + chunk)]; }

    void measure(int64_t t, int64_t chunk) {
        const Record& record = records_[t];
        const int64_t start = chunk * kChunk, length = std::min(kChunk, record.n - start);
        double* chunk_sums = &partial_[3 * size_t(first_[size_t(t)] + chunk)];
        if (reads_[size_t(t)] == Reads::kAll) kernels_.measure(call_, record, start, length, chunk_sums);
        if (reads_[size_t(t)] == Reads::kOnce) {
            const double usual = kUsual * double(length) / double(record.n) * record.prev_norm * record.prev_norm;
            num_updated(t, chunk) = kernels_.advance(call_, record, start, length, usual, chunk_sums + 1);
        } else if (call_.op != kProducts) {
            chunk_sums[1] = squares_of_g(record, start, length);
        }
        if (pending_[size_t(t)].fetch_sub(1, std::memory_order_acq_rel) == 1) conclude(t);
    }

    double squares_of_g(Record record, int64_t start, int64_t length) const {
        Call call = call_;
        call.op = kProducts;
        record.prev = nullptr;
        double sums[3];
        kernels_.measure(call, record, start, length, sums);
        return sums[0];
    }

    // ||c|| <= |a + b ratio| ||g|| + |b| ||g'||
    static double bound(const Record& r, double g_norm) {
        if (!r.prev || r.b == 0) return std::fabs(r.a) * g_norm;
        return std::fabs(r.a + r.b * r.ratio) * g_norm + std::fabs(r.b) * r.prev_norm;
    }

    // Norms of successive gradients are much alike: where last step's would do with some room, g is asked first.
    Reads reads(const Record& r) const {
        if (bound(r, r.g_norm) <= call_.clip_norm) return Reads::kNothing;
        const bool is_likely = r.prev && std::isinf(r.g_norm) && bound(r, 1.25 * r.prev_norm) <= call_.clip_norm;
        if (!is_likely) return Reads::kAll;
        return kernels_.can_advance(call_, r) ? Reads::kOnce : Reads::kGradient;
    }

    // By whichever thread measured a tensor's last chunk.
    void conclude(int64_t t) {
        double total[3] = {};
        for (int64_t c = first_[size_t(t)]; c < first_[size_t(t) + 1]; ++c)
            for (int k = 0; k < 3; ++k) total[k] += partial_[3 * size_t(c) + size_t(k)];
        if (call_.op == kProducts) {
            std::copy(total, total + 3, sums_ + 3 * t);
            return;
        }
        if (sums_) sums_[3 * t] = total[1];
        double norm = std::sqrt(total[0]);
        if (reads_[size_t(t)] != Reads::kAll) {
            norm = bound(records_[t], std::sqrt(total[1]));
            if (!(norm <= call_.clip_norm)) norm = norm_of_c(t);  // it grew: seldom
        }
        clip_[size_t(t)] = norm <= call_.clip_norm ? 1.0 : call_.clip_norm / norm;
        pending_[size_t(t)].store(kConcluded, std::memory_order_release);
    }

    double norm_of_c(int64_t t) {
        const Record& record = records_[t];
        double total = 0, sums[3];
        for (int64_t start = 0; start < record.n; start += kChunk) {
            kernels_.measure(call_, record, start, std::min(kChunk, record.n - start), sums);
            total += sums[0];
        }
        return std::sqrt(total);
    }

    // Waits, briefly: everything that the norm needs was taken by running threads before this task.
    double clip(int64_t t) {
        if (!measures_) return 1.0;
        while (pending_[size_t(t)].load(std::memory_order_acquire) != kConcluded) std::this_thread::yield();
        return clip_[size_t(t)];
    }

    static constexpr int64_t kConcluded = -1;

    const Call& call_;
    const Record* records_;
    const int64_t count_;
    const Kernels& kernels_;
    double* sums_;
    const bool measures_;
    std::vector<int64_t> first_;  // each tensor's first chunk, counted over all tensors
    std::vector<Reads> reads_;
    std::vector<Window> windows_;
    std::vector<size_t> window_;  // of each tensor
    std::vector<int64_t> reader_;  // of each tensor: whose g' it writes over; -1: nobody else's
    std::unique_ptr<std::atomic<int64_t>[]> unfinished_;  // of each tensor: tasks that update it
    std::vector<Task> tasks_;
    std::vector<double> partial_;  // three sums a chunk
    std::vector<double> clip_;
    std::vector<int32_t> num_updated_;  // elements of each chunk, from its start, that `advance` has updated
    std::unique_ptr<std::atomic<int64_t>[]> pending_;  // chunks of each tensor yet to be measured
    std::atomic<size_t> next_{0};
};

bool within(int32_t value, int32_t limit) { return value >= 0 && value < limit; }

bool is_valid(const Call& c) {
    const bool is_double = c.arithmetic == kDouble;
    const int32_t formats[] = {c.x_format, c.g_format, c.prev_format, c.m_format, c.v_format, c.out_format};
    for (int32_t format : formats)
        if (!within(format, kNumFormats) || (format == kF64 && !is_double)) return false;
    const bool is_narrow = c.x_format == kBF16 || c.x_format == kF16;
    return within(c.op, kNumOps) && within(c.arithmetic, kNumArithmetics) && within(c.rounding, kNumRoundings) &&
           (is_double ? c.x_format == kF64 : is_narrow || c.x_format == kF32) && (is_narrow || c.rounding == kNearest) &&
           c.g_format != kQ8 && c.out_format != kQ8;
}

}  // namespace
}  // namespace mars

MARS_EXPORT int32_t mars_abi_version() { return mars::kAbiVersion; }

// Bit i: level i was compiled and this CPU has it.
MARS_EXPORT int32_t mars_isa_levels() {
    int32_t levels = 0;
    for (int32_t isa = 0; isa < mars::kNumIsas; ++isa) levels |= mars::kernels_for(isa, mars::kFloat) ? 1 << isa : 0;
    return levels;
}

// `sums`: three doubles a tensor, for kProducts; else null, or g.g in the first of each where there is a clip to find.
// `has_begun`, if given, becomes 1 before anything else is written. Returns a Status.
MARS_EXPORT int32_t mars_run(int32_t isa, const mars::Call* call, const mars::Record* records, int64_t count,
                             double* sums, uint8_t* has_begun) {
    using namespace mars;
    if (!is_valid(*call) || (call->op == kProducts && !sums)) return kBadCall;
    const Kernels* kernels = kernels_for(isa, call->arithmetic);
    if (!kernels) return kBadIsa;
    try {
        Plan plan(*call, records, count, *kernels, sums);
        if (has_begun) *has_begun = 1;
        plan.run();
    } catch (const std::invalid_argument&) {
        return kBadCall;
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

// Adds to each number, a float or a double, and tells what it is then. Step counts are numbers in memory of their own.
MARS_EXPORT void mars_add(void* const* numbers, int64_t count, int32_t is_double, double increment, double* values) {
    for (int64_t i = 0; i < count; ++i) {
        if (is_double) {
            values[i] = *static_cast<double*>(numbers[i]) += increment;
        } else {
            values[i] = *static_cast<float*>(numbers[i]) += float(increment);
        }
    }
}
