// The k entries of largest magnitude, exactly: a radix select on the bits of |v|, ties going to the lower
// index.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/array.h"

namespace freemerge::cuda {

struct Selection {
  Array model;  // v = model - base, float; rows x columns, contiguous
  Array base;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t k;         // 1 <= k <= columns
  std::int64_t* indices;  // rows x k: the first counts[row] of each row are set, flat and ascending
  float* values;          // rows x k: v there
  std::int64_t* counts;   // rows: the smaller of k and the number of entries that aren't zero
};

// Bytes of scratch for select(); 256-byte aligned.
std::size_t select_scratch(std::int64_t rows, std::int64_t columns);

// The k largest |v| of each row, zeros never. NaN counts as larger than infinity.
void select(const Selection& selection, void* scratch, cudaStream_t stream);

}  // namespace freemerge::cuda
