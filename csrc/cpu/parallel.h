// Loops over independent blocks. Each block's result depends on its index alone, so results do not depend on
// the number of threads. OpenMP's threads are used because torch's loops run on the same ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace freemerge {

// Workers that `threads` threads make of `blocks` blocks.
inline int workers_for(std::int64_t blocks, int threads) {
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(blocks, threads)));
}

// Calls body(block, worker) for every 0 <= block < blocks, with 0 <= worker < workers. One worker means no
// threads at all. If bodies throw, one of their exceptions is rethrown when all workers are done.
template <typename Body>
void parallel_for(std::int64_t blocks, int workers, const Body& body) {
  workers = workers_for(blocks, workers);
  if (workers == 1) {
    for (std::int64_t block = 0; block < blocks; ++block) body(block, 0);
    return;
  }
  std::exception_ptr error;
  std::mutex mutex;
  const auto guarded = [&](std::int64_t block, int worker) {
    try {
      body(block, worker);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  };
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(workers)
  for (std::int64_t block = 0; block < blocks; ++block) guarded(block, omp_get_thread_num());
#else
  std::atomic<std::int64_t> next{0};
  const auto run = [&](int worker) {
    for (std::int64_t block = next++; block < blocks; block = next++) guarded(block, worker);
  };
  std::vector<std::thread> threads;
  try {
    threads.reserve(static_cast<std::size_t>(workers));
    for (int worker = 1; worker < workers; ++worker) threads.emplace_back(run, worker);
  } catch (...) {  // the system has no more: those that there are do all of it
  }
  run(0);
  for (std::thread& thread : threads) thread.join();
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace freemerge
