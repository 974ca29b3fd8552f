// cuFFT plans for batched transforms, the latest of each thread cached, of all devices together. Work areas
// are the caller's, taken for one call: a plan holds none.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "cuda/cufft_api.h"

namespace freemerge::cuda {

// Plain data, compared field by field. A real transform runs along lines, or over `rows` of them in two
// dimensions; batch entries follow one another.
struct FftKey {
  int device;
  cufft::Type type;
  cufft::Size rows;    // of one two-dimensional transform; 0: one-dimensional
  cufft::Size length;  // samples of a line
  cufft::Size batch;
  cufft::Size real_pitch;     // floats from line to line
  cufft::Size complex_pitch;  // complex numbers from line to line

  bool operator==(const FftKey& other) const {
    return device == other.device && type == other.type && rows == other.rows && length == other.length &&
           batch == other.batch && real_pitch == other.real_pitch && complex_pitch == other.complex_pitch;
  }
};

class Fft {
 public:
  explicit Fft(const FftKey& key);
  ~Fft();
  Fft(const Fft&) = delete;
  Fft& operator=(const Fft&) = delete;

  std::size_t work_bytes() const { return work_bytes_; }

  // Unnormalised; in place where `in` is `out`. A transform to real numbers destroys its input. `work` has at
  // least work_bytes(), and nothing else uses it until the stream has got past this call.
  void execute(void* in, void* out, void* work, cudaStream_t stream) const;

 private:
  cufft::Handle handle_ = 0;
  cufft::Type type_;
  std::size_t work_bytes_ = 0;
};

// Whether a stream records a graph.
bool is_capturing(cudaStream_t stream);

// The calling thread's plan for `key`, made if needed; valid until the thread asks for the next one. Plans
// used while a graph is recorded (`capturing`) stay for the life of the thread, because the graph refers to
// them; making one at that time is an error (run once before capture).
const Fft& cached_fft(const FftKey& key, bool capturing);

// Destroys the calling thread's plans.
void clear_fft_cache();

// Plans the calling thread holds.
std::size_t fft_cache_size();

}  // namespace freemerge::cuda
