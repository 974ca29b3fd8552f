// The constant that a filter takes out of a matrix first, where a large mean would drown a small result in
// rounding.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/matrices.h"

namespace freemerge::cuda {

struct SampleMean {
  Matrices matrices;
  std::int64_t height;
  std::int64_t width;
  float* means;  // one a matrix
};

// The mean of a sample of each matrix if it exceeds the sample's deviation, else 0.
void sample_mean(const SampleMean& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
