#pragma once

// A call's work cut into tasks, and what comes when: none of it depends on the number of threads.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "abi.h"

namespace mars {

constexpr int64_t kChunk = 32768;  // elements whose sums are added up by themselves; whole blocks of kQ8Block
static_assert(kChunk % kQ8Block == 0, "a scale belongs to one task");
constexpr int64_t kWindow = 1 << 17;  // elements measured before they are updated: g and g' of these stay in the cache
constexpr int64_t kSpan = 4;  // chunks a task: memory likes long runs

// What a tensor's clip factor takes: nothing, since a bound says 1; g alone, since the bound probably will; or all of c.
// kOnce: g alone, and each line is updated right after it was measured, as if the bound would do. Where in the end it does
// not, the chunks are amended. What follows a line that promises trouble waits, in its chunk, until the norm is known.
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

inline int64_t chunks_of(const Record& record) { return (record.n + kChunk - 1) / kChunk; }

class Order {
public:
    // `reads` tells for each record what its clip factor takes. Throws where a `next` is a `prev` that is not read before.
    Order(int32_t op, const Record* records, int64_t count, const std::vector<Reads>& reads)
        : records_(records), count_(count), reads_(reads), window_(size_t(count)), reader_(size_t(count), -1) {
        if (op == kProducts) {
            add_tasks(true, 0, count);
            return;
        }
        cut();
        find_readers();
        arrange();
    }

    const std::vector<Task>& tasks() const { return tasks_; }

    // Whose g' this tensor's next one is written over; -1: nobody else's.
    int64_t reader(int64_t t) const { return reader_[size_t(t)]; }

private:
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
    void arrange() {
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
        const int64_t chunks = chunks_of(records_[t]);
        for (int64_t c = 0; c < chunks; c += kSpan) tasks_.push_back({measures, t, c, std::min(c + kSpan, chunks)});
    }

    const Record* records_;
    const int64_t count_;
    const std::vector<Reads>& reads_;
    std::vector<Window> windows_;
    std::vector<size_t> window_;  // of each tensor
    std::vector<int64_t> reader_;
    std::vector<Task> tasks_;
};

}  // namespace mars
