// Loops over independent blocks. Each block's result depends on its index alone, so results do not depend on
// the number of threads. OpenMP's threads are used because torch's loops run on the same ones.
#pragma once

#include <algorithm>
#include <cfenv>
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

// The caller's modes of floating-point arithmetic, such as torch.set_flush_denormal's: OpenMP's threads keep
// those that they began with, so that results would depend on which thread computes what.
class ArithmeticModes {
 public:
  ArithmeticModes() { std::fegetenv(&modes_); }

  // Calls body() with them.
  template <typename Body>
  void with(const Body& body) const {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&modes_);
    body();
    std::fesetenv(&own);
  }

 private:
  std::fenv_t modes_;
};

// Calls body(block, worker) for every 0 <= block < blocks, with 0 <= worker < workers. One worker means no
// threads at all. If bodies throw, one of their exceptions is rethrown when all workers are done.
template <typename Body>
void parallel_for(std::int64_t blocks, int workers, const Body& body) {
  workers = workers_for(blocks, workers);
  if (workers == 1) {
    for (std::int64_t block = 0; block < blocks; ++block) body(block, 0);
    return;
  }
  const ArithmeticModes modes;
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
#pragma omp parallel num_threads(workers)
  modes.with([&] {
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t block = 0; block < blocks; ++block) guarded(block, omp_get_thread_num());
  });
#else
  std::atomic<std::int64_t> next{0};
  const auto run = [&](int worker) {
    modes.with([&] {
      for (std::int64_t block = next++; block < blocks; block = next++) guarded(block, worker);
    });
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

inline std::int64_t blocks_in(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Calls visit(block, begin, count) for each block of at most `size` of n entries.
template <typename Visit>
void for_blocks(std::int64_t n, std::int64_t size, int threads, const Visit& visit) {
  parallel_for(blocks_in(n, size), threads, [&](std::int64_t block, int) {
    visit(block, block * size, std::min(size, n - block * size));
  });
}

}  // namespace freemerge
