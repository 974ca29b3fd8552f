// What the filter works on: matrices of one shape and dtype, each somewhere in device memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cuda/heuristics.h"

namespace freemerge::cuda {

// Up to kMatricesPerLaunch matrices as a kernel argument. Columns are contiguous, rows `row_stride` entries
// apart.
struct Matrices {
  void* data[heuristics::kMatricesPerLaunch];
  std::int64_t row_stride[heuristics::kMatricesPerLaunch];
  int count;
  DType dtype;
};

}  // namespace freemerge::cuda
