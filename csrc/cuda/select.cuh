// The k entries of largest magnitude, exactly: a radix select on the bits of |v|, ties going to the lower index.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/array.h"

namespace freemerge::cuda {

struct Selection {
  Array values;  // rows x columns, contiguous
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t k;         // 1 <= k <= columns
  std::int64_t* indices;  // rows x k, ascending, counted within the row
  float* kept;            // rows x k: the values there
};

// Bytes of scratch for select(); 256-byte aligned.
std::size_t select_scratch(std::int64_t rows, std::int64_t columns);

// The k largest |v| of each row. NaN counts as larger than infinity.
void select(const Selection& selection, void* scratch, cudaStream_t stream);

}  // namespace freemerge::cuda
