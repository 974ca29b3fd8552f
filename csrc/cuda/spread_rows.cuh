// Spreading along the rows axis: H samples to partial coarse rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/array.h"
#include "cuda/matrices.h"
#include "cuda/window_tables.h"

namespace freemerge::cuda {

// Of a thread and of a block of the passes along rows.
constexpr int kColumnsPerThread = kQuad;
constexpr int kColumnsPerBlock = kColumnsPerThread * heuristics::kRowPassThreads;

// The rows of a matrix in chunks of `rows` samples, so that each is read once, by one block for each run of
// columns. A chunk gives `reach` partial coarse rows at most, from the first cell that its first sample
// touches on; the coarse rows are their sums. A panel holds chunks [begin, end):
// partials[matrix][chunk - begin][i][column], rows `pitch` floats apart, `pitch` a multiple of
// kColumnsPerThread.
struct RowChunks {
  std::int64_t rows;
  std::int64_t reach;
  std::int64_t begin;
  std::int64_t end;
  std::int64_t pitch;
};

struct SpreadRows {
  Matrices matrices;
  WindowTables window;
  RowChunks chunks;
  std::int64_t width;
  const float* centers;  // a constant for each matrix
  float* partials;
};

// partials = window^T * (matrices - centers), chunk by chunk
void spread_rows(const SpreadRows& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
