// cuFFT plans for in-place batched transforms, cached for each thread and device. Work areas are the
// caller's, taken for one call: a plan holds none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/cufft_api.h"

namespace freemerge::cuda {

// Plain data, compared field by field. Real transforms are padded in place: a line of n floats has room for
// n / 2 + 1 complex numbers. Complex lines are dense. Batch entries follow one another.
struct FftKey {
  int device;
  cufft::Type type;
  cufft::Size rows;    // 0: one-dimensional
  cufft::Size length;  // of the contiguous axis
  cufft::Size batch;

  bool operator==(const FftKey& other) const {
    return device == other.device && type == other.type && rows == other.rows && length == other.length &&
           batch == other.batch;
  }
};

class Fft {
 public:
  explicit Fft(const FftKey& key);
  ~Fft();
  Fft(const Fft&) = delete;
  Fft& operator=(const Fft&) = delete;

  std::size_t work_bytes() const { return work_bytes_; }

  // `direction` matters for complex transforms only: cufft::kForward or kInverse, both unnormalised. `work`
  // has at least work_bytes(), and nothing else uses it until the stream has got past this call.
  void execute(void* data, void* work, cudaStream_t stream, int direction = cufft::kForward) const;

 private:
  cufft::Handle handle_ = 0;
  cufft::Type type_;
  std::size_t work_bytes_ = 0;
};

// The calling thread's plan for `key`, made if needed; valid until the thread asks for the next one. Plans
// used while `stream` records a graph stay for the life of the thread, because the graph refers to them;
// making one at that time is an error (run once before capture).
const Fft& cached_fft(const FftKey& key, cudaStream_t stream);

// Destroys the calling thread's plans.
void clear_fft_cache();

// Plans the calling thread holds.
std::size_t fft_cache_size();

}  // namespace freemerge::cuda
