// Copies of rows between matrices and the memory of their spectra, where cuFFT cannot work on the matrices
// themselves.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/half_spectra.h"
#include "cuda/matrices.h"

namespace freemerge::cuda {

// Some rows of these matrices, counted over all of them: matrix * height + row.
struct RowCopy {
  Matrices matrices;
  Spectra spectra;
  std::int64_t row_begin;
  std::int64_t row_count;
};

// rows of the spectra = rows of the matrices, as floats
void pack(const RowCopy& arguments, cudaStream_t stream);

// rows of the matrices = rows of the spectra, rounded to the storage dtype
void unpack(const RowCopy& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
