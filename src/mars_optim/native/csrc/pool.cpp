#include "pool.h"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef _WIN32
static long process_id() { return 0; }  // no fork
#else
#include <unistd.h>
static long process_id() { return getpid(); }
#endif
#ifdef __linux__
#include <dlfcn.h>
#endif

namespace mars {
namespace {

class Pool {
public:
    const long owner = process_id();

    void run(int num_threads, void (*body)(void*), void* data) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (turn.owns_lock() && num_threads > 1) open(num_threads - 1, body, data);
        body(data);
        if (turn.owns_lock() && num_threads > 1) close();
    }

private:
    void open(int seats, void (*body)(void*), void* data) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = body;
            data_ = data;
            seats_ = seats;
            try {
                for (; num_workers_ < seats; ++num_workers_) std::thread(&Pool::work, this).detach();
            } catch (const std::system_error&) {
                // Fewer threads than asked for do the same work.
            }
        }
        wake_.notify_all();
    }

    // Whoever has not come yet need not come any more.
    void close() {
        std::unique_lock<std::mutex> lock(mutex_);
        seats_ = 0;
        idle_.wait(lock, [this] { return num_active_ == 0; });
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return seats_ > 0; });
            --seats_;
            ++num_active_;
            void (*body)(void*) = body_;
            void* data = data_;
            lock.unlock();
            body(data);
            lock.lock();
            if (--num_active_ == 0) idle_.notify_one();
        }
    }

    std::mutex turn_;   // held by the caller being served
    std::mutex mutex_;  // guards what follows
    std::condition_variable wake_, idle_;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    int seats_ = 0;
    int num_workers_ = 0;
    int num_active_ = 0;
};

// Never destroyed: its threads sleep on it until the process ends. A forked child has none of its parent's threads, and
// perhaps locks that nobody will open, so it leaves the parent's pool alone and makes its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
    Pool* known = current.load(std::memory_order_acquire);
    while (!known || known->owner != process_id()) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(known, fresh, std::memory_order_acq_rel)) return *fresh;
        delete fresh;
    }
    return *known;
}

// A body and its caller's floating-point environment (whether subnormals are flushed, say), so that all threads agree.
struct Job {
    void (*body)(void*);
    void* data;
    std::fenv_t environment;

    static void run(void* self) {
        const Job& job = *static_cast<Job*>(self);
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&job.environment);
        job.body(job.data);
        std::fesetenv(&own);
    }
};

// torch's own threads, where they are GNU OpenMP's: after a backward pass they spin on the other cores for a while, and
// threads of ours would have to share those with them. Not in a forked child, where GNU OpenMP hangs.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

const long loader = process_id();

GompParallel gomp_parallel() {
#ifdef __linux__
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return process_id() == loader ? found : nullptr;
#else
    return nullptr;
#endif
}

}  // namespace

void run_parallel(int num_threads, void (*body)(void*), void* data) {
    if (num_threads <= 1) return body(data);
    Job job{body, data, {}};
    std::fegetenv(&job.environment);
    if (GompParallel parallel = gomp_parallel()) parallel(Job::run, &job, unsigned(num_threads), 0);
    else pool().run(num_threads, Job::run, &job);
}

}  // namespace mars
