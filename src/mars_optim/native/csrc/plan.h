#pragma once

// One call's tensors, what is found out about them, and the threads' work on them.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "abi.h"
#include "order.h"
#include "pool.h"

namespace mars {

constexpr double kUsual = 4;  // times a chunk's share of ||g'||^2: what a lane may have of ||g||^2 and be nothing special

class Plan {
public:
    Plan(const Call& call, const Record* records, int64_t count, const Kernels& kernels, double* sums)
        : call_(call), records_(records), count_(count), kernels_(kernels), sums_(sums),
          measures_(call.op == kProducts || (call.op != kDescend && call.clip_norm > 0)), reads_(what_it_takes()),
          order_(call.op, records, count, reads_), first_(size_t(count) + 1),
          unfinished_(new std::atomic<int64_t>[size_t(count)]) {
        for (int64_t t = 0; t < count; ++t) {
            first_[size_t(t) + 1] = first_[size_t(t)] + chunks_of(records[t]);
            unfinished_[size_t(t)].store((chunks_of(records[t]) + kSpan - 1) / kSpan, std::memory_order_relaxed);
        }
        if (measures_) {
            partial_.resize(3 * size_t(first_.back()));
            clip_.resize(size_t(count), 1.0);
            num_updated_.resize(size_t(first_.back()));
            pending_.reset(new std::atomic<int64_t>[size_t(count)]);
            for (int64_t t = 0; t < count; ++t) {
                const bool knows = reads_[size_t(t)] == Reads::kNothing;
                pending_[size_t(t)].store(knows ? kConcluded : chunks_of(records[t]), std::memory_order_relaxed);
            }
        }
        if (sums) std::fill(sums, sums + 3 * count, 0.0);
    }

    void run() {
        // All threads or one: OpenMP dismisses threads that a smaller team leaves over.
        int64_t elements = 0;
        for (int64_t t = 0; t < count_; ++t) elements += records_[t].n;
        const int num_threads = elements < 2 * kChunk ? 1 : call_.num_threads;
        run_parallel(num_threads, [](void* plan) { static_cast<Plan*>(plan)->work(); }, this);
    }

private:
    std::vector<Reads> what_it_takes() const {
        std::vector<Reads> result(size_t(count_), measures_ ? Reads::kAll : Reads::kNothing);
        for (int64_t t = 0; measures_ && call_.op != kProducts && t < count_; ++t) result[size_t(t)] = reads(records_[t]);
        return result;
    }

    void work() {
        for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < order_.tasks().size();) {
            const Task& task = order_.tasks()[i];
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
        const int64_t reader = order_.reader(t);
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
    const std::vector<Reads> reads_;
    const Order order_;
    std::vector<int64_t> first_;  // each tensor's first chunk, counted over all tensors
    std::unique_ptr<std::atomic<int64_t>[]> unfinished_;  // of each tensor: tasks that update it
    std::vector<double> partial_;  // three sums a chunk
    std::vector<double> clip_;
    std::vector<int32_t> num_updated_;  // elements of each chunk, from its start, that `advance` has updated
    std::unique_ptr<std::atomic<int64_t>[]> pending_;  // chunks of each tensor yet to be measured
    std::atomic<size_t> next_{0};
};

}  // namespace mars
