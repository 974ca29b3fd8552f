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
  // Of one float matrix: squares[block], the sum of the squares that a block writes, blocks being those of
  // all chunks; or null.
  double* squares;
  AddLast add;  // of one float matrix, which then stays as it is
};

// Whether four neighbours of each row are one access: what an addition on the way takes.
inline bool in_quads(const Array& array, std::int64_t width) {
  return width % kColumnsPerThread == 0 && reinterpret_cast<std::uintptr_t>(array.data) % 16 == 0;
}

// matrices = gain * matrices + center_gain * centers + rows * grids * columns^T, rounded to the storage
// dtype, or added to a base, elsewhere
void interpolate(const Interpolate& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
