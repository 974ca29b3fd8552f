// Spreading along the columns axis: partial coarse rows of W samples to the coarse grid.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/spread_rows.cuh"

namespace freemerge::cuda {

// Real coarse grids as cuFFT transforms them in place: grid[matrix][row][column], rows `pitch` floats apart
// and matrices `step`, which may leave room for more rows: see coarse_bins.h.
struct CoarseGrids {
  float* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pitch;  // at least 2 * (columns / 2 + 1), a multiple of 4
  std::int64_t step;
  int count;
};

struct SpreadColumns {
  CoarseGrids grids;
  WindowTables rows;
  WindowTables columns;  // or a whole axis: the coarse rows are the grid's
  RowChunks chunks;
  const float* partials;
  std::int64_t row_begin;  // the coarse rows that these chunks touch; they wrap around the end of the grid
  std::int64_t row_count;
};

// grids += window^T * (the sum of the partial rows of each coarse row). The grids start from zero.
void spread_columns(const SpreadColumns& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
