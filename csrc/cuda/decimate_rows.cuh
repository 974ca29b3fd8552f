// Windowed passes along the rows axis: H samples down to coarse rows, and back.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/matrices.h"

namespace freemerge::cuda {

// A panel is a run of coarse rows [cell_begin, cell_begin + cell_count) of all matrices, W floats each,
// dense: panel[matrix][cell - cell_begin][column].
struct DownRows {
  Matrices matrices;
  WindowTables window;
  std::int64_t width;
  std::int64_t cell_begin;
  std::int64_t cell_count;
  const float* centers;  // a constant for each matrix
  float* panel;
};

// panel = window^T * (matrices - centers)
void down_rows(const DownRows& arguments, cudaStream_t stream);

// Writes the samples that start in cells [cell_begin, cell_begin + cell_count). Their windows reach further,
// so this panel has padded_taps - 1 coarse rows more, wrapped around the end of the grid.
struct UpRows {
  Matrices matrices;
  WindowTables window;
  std::int64_t width;
  std::int64_t cell_begin;
  std::int64_t cell_count;
  const float* centers;
  const float* panel;
  float gain;
  float center_gain;
};

// matrices = gain * matrices + center_gain * centers + window * panel, rounded to the storage dtype
void up_rows(const UpRows& arguments, cudaStream_t stream);

// How the passes above cut `cell_count` cells into blocks.
std::int64_t cells_per_block(std::int64_t width, std::int64_t cell_count, int matrices);

}  // namespace freemerge::cuda
