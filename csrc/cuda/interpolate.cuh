// Interpolation of the coarse grids along both axes, fused with the last step of the filter.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/spread_columns.cuh"
#include "cuda/task_vectors.h"

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
  AddLast add;  // of one float matrix, which then stays as it is; in_quads()
};

// matrices = gain * matrices + center_gain * centers + rows * grids * columns^T, rounded to the storage
// dtype, or added to a base, elsewhere
void interpolate(const Interpolate& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
