// The one way native code uses threads: OpenMP, whose runtime (libgomp) the extension shares with torch.
#pragma once

#include <cstdint>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace freemerge {

// Calls body(i) for i in [0, count) on at most `threads` threads, each taking one contiguous range. If bodies
// throw, one of their exceptions is rethrown when all threads are done.
template <typename Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && count > 1) {
    std::exception_ptr error;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t i = 0; i < count; ++i) {
      try {
        body(i);
      } catch (...) {
#pragma omp critical(freemerge_parallel_for)
        error = std::current_exception();
      }
    }
    if (error) std::rethrow_exception(error);
    return;
  }
#endif
  static_cast<void>(threads);
  for (std::int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace freemerge
