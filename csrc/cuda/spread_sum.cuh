// The first pass of a filter over a weighted sum of task vectors that isn't there yet: what spread_rows.cuh
// and the sum of accumulate.cuh do, in one pass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/spread_rows.cuh"
#include "cuda/task_vectors.h"

namespace freemerge::cuda {

struct SpreadSum {
  TaskVectors vectors;  // matrices of contiguous rows
  float* sum;           // their weighted sum, which is written
  WindowTables window;
  RowChunks chunks;
  std::int64_t width;
  const float* center;
  float* partials;
  // sums[i][block], blocks being those of all chunks: of |v_i| for each model, then of the squares of the
  // sum.
  double* sums;
  std::int64_t blocks;
};

// The same bytes as accumulate() and spread_rows() give, but for the order in which |v_i| is summed.
void spread_sum(const SpreadSum& arguments, cudaStream_t stream);

// The entries of the weighted sum that sample_mean() looks at, as a matrix of sample_rows x sample_columns.
void sample_sum(const TaskVectors& vectors, std::int64_t height, std::int64_t width, float* samples,
                cudaStream_t stream);

}  // namespace freemerge::cuda
