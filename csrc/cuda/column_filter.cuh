// The column half of the full form, fused: FFT down the columns of half spectra, mask, inverse FFT, one read
// and one write. Columns stay in shared memory in between.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/mask.h"
#include "cuda/column_tables.h"
#include "cuda/pack.cuh"

namespace freemerge::cuda {

struct ColumnFilter {
  Spectra spectra;
  Mask mask;
  double factor;        // scale / (H W)
  float step_gains[3];  // of a mask of steps, factor included
  ColumnTables tables;
};

// What column_filter() can take: a few columns must fit the current device's shared memory, and prime factors
// are bounded.
std::int64_t longest_column();
constexpr int kLargestColumnPrime = 7;

// Multiplies the columns' spectra by factor * M.
void column_filter(const ColumnFilter& arguments, cudaStream_t stream);

// The same multiplication alone, for spectra of whole matrices. Uses no tables.
void column_mask(const ColumnFilter& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
