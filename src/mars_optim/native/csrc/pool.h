#pragma once

namespace mars {

// Runs body(data) on up to `num_threads` threads at once, the caller among them, and returns when all have left it. The
// body must do the whole work whatever the number of threads: it draws tasks from a shared counter. If the pool is busy
// for another caller, the caller works alone.
void run_parallel(int num_threads, void (*body)(void*), void* data);

}  // namespace mars
