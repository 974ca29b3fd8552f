// Interpolation of the coarse grids along the columns axis: coarse rows of W samples, as the matrices have.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/spread_columns.cuh"

namespace freemerge::cuda {

// Coarse rows begin .. begin + count - 1 of each matrix: data[matrix][i][column], rows `pitch` floats apart,
// a multiple of 4, and matrices `step`. They wrap around where all of them are here.
struct CoarseLines {
  float* data;
  std::int64_t begin;
  std::int64_t count;
  std::int64_t pitch;
  std::int64_t step;
};

struct ExpandColumns {
  CoarseGrids grids;
  WindowTables window;
  CoarseLines lines;
};

// lines = grids * window^T
void expand_columns(const ExpandColumns& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
