// Windowed passes along the columns axis: W samples down to coarse columns, and back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/matrices.h"

namespace freemerge::cuda {

// Real coarse grids as cuFFT transforms them in place: grid[matrix][row][column], rows `pitch` floats apart.
struct CoarseGrids {
  float* data;
  std::int64_t rows;
  std::int64_t columns;
  std::int64_t pitch;  // 2 * (columns / 2 + 1)
  int count;
};

struct ColumnPass {
  CoarseGrids grids;
  WindowTables window;
  float* panel;            // panel[matrix][row - row_begin][W samples], dense
  std::int64_t row_begin;  // coarse rows of the panel; they wrap around the end of the grid
  std::int64_t row_count;
};

// Rows of the grids = panel * window
void down_columns(const ColumnPass& arguments, cudaStream_t stream);

// panel = rows of the grids * window^T
void up_columns(const ColumnPass& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
