// The constant that a filter takes out of a matrix first, where a large mean would drown a small result in
// rounding.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/mask.h"
#include "cuda/matrices.h"

namespace freemerge::cuda {

// Of the sample of a matrix.
FM_HOST_DEVICE inline int sample_rows(std::int64_t height) {
  return height < 16 ? static_cast<int>(height) : 16;
}
FM_HOST_DEVICE inline int sample_columns(std::int64_t width) {
  return width < 64 ? static_cast<int>(width) : 64;
}

struct SampleMean {
  Matrices matrices;
  std::int64_t height;
  std::int64_t width;
  float* means;  // one a matrix
};

// The mean of a sample of each matrix if it exceeds the sample's deviation, else 0.
void sample_mean(const SampleMean& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
