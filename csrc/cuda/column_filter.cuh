// The column half of the full form, fused: FFT down the columns of half spectra, mask, inverse FFT, one read
// and one write. Columns stay in shared memory in between.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/mask.h"
#include "cuda/lines.cuh"

namespace freemerge::cuda {

struct ColumnFilter {
  Spectra spectra;
  Mask mask;
  double factor;       // scale / (H W)
  const float* gains;  // for each bin of a row, the gain of its column, or NaN where that varies
  // For masks of steps, else null: for each bin of a row, how many rows from frequency 0 on have the first
  // gain, and how many the first or the second; and these gains, factor included.
  const int2* steps;
  float step_gains[3];
  const float2* roots;  // exp(-2 pi i k / height) for 0 <= k < height
};

// Whether columns of this height fit: factors of 2, 3, 5 and 7 only, and short enough for a few of them to
// share the current device's shared memory.
bool column_filter_takes(std::int64_t height);

// Multiplies the columns' spectra by factor * M.
void column_filter(const ColumnFilter& arguments, cudaStream_t stream);

// The same multiplication alone, for spectra of whole matrices.
void column_mask(const ColumnFilter& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
