// The mask of the pruned and full forms, on transformed columns of the spectrum.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/lines.cuh"
#include "mask.h"

namespace freemerge::cuda {

struct ColumnMask {
  Spectrum spectrum;
  std::int64_t lines;         // length of a column
  std::int64_t column_first;  // flattened over matrices: matrix * column_count + column
  std::int64_t columns;       // how many of them
  Mask mask;
  bool transposed;
  double background;
  double scale;
};

// Multiplies each bin by scale * (M - background) / (H W).
void column_mask(const ColumnMask& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
