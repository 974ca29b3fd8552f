// Executes a Plan on matrices in device memory: the order of the kernels, and what they keep where.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/plan.h"
#include "cuda/matrices.h"

namespace freemerge::cuda {

struct FilterJob {
  Plan plan;  // decimated or full
  DType dtype;
  std::vector<void*> matrices;
  std::vector<std::int64_t> row_strides;  // in entries
  double scale;
  // kDecimated: windows of both axes, in device memory; the columns axis may be whole.
  WindowTables rows;
  WindowTables columns;
  // kFull: see ColumnFilter; without roots, cuFFT transforms whole matrices.
  const float* gains;
  const int2* steps;
  const float2* roots;
};

// Bytes of workspace that filter() needs for this job, or for any number of such matrices if `matrices` is
// empty. Makes the cuFFT plans of the job for the current device.
std::size_t filter_workspace(const FilterJob& job, cudaStream_t stream);

// Filters each matrix in place on `stream` of the current device: y = scale * Re(ifft2(M * fft2(x))). Returns
// as soon as everything is queued. `workspace` is device memory, aligned to 256 bytes.
void filter(const FilterJob& job, void* workspace, std::size_t workspace_bytes, cudaStream_t stream);

}  // namespace freemerge::cuda
