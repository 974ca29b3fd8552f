// Interpolation of the coarse grids along both axes, fused with the last step of the filter.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/spread_columns.cuh"

namespace freemerge::cuda {

struct Interpolate {
  Matrices matrices;
  CoarseGrids grids;
  WindowTables rows;
  WindowTables columns;  // or a whole axis
  RowChunks chunks;      // all of them
  const float* centers;
  float gain;
  float center_gain;
  // Of one float matrix: squares[block], the sum of the squares that a block writes, blocks being those of
  // all chunks; or null.
  double* squares;
};

// matrices = gain * matrices + center_gain * centers + rows * grids * columns^T, rounded to the storage dtype
void interpolate(const Interpolate& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
