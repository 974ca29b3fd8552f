// A plan prepared for a device: its tables are there, and it filters any number of matrices of the plan's
// shape.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/plan.h"
#include "cuda/column_tables.h"
#include "cuda/task_vectors.h"
#include "cuda/three_kernels.h"
#include "cuda/window_tables.h"

namespace freemerge::cuda {

// Where matrices are in device memory. Columns are contiguous.
struct MatrixList {
  std::vector<void*> data;
  std::vector<std::int64_t> row_strides;  // in entries
};

struct Filter {
  // `column_gains`, for fused columns and three kernels: see ColumnTables.
  Filter(const Plan& plan, DType dtype, const std::vector<float>& column_gains, const Upload& upload);

  // Bytes of workspace for these matrices, or for any number of them if there are none. Makes the cuFFT plans
  // of the call for the current device.
  std::size_t workspace_bytes(const MatrixList& matrices, cudaStream_t stream,
                              const SumFirst* sum = nullptr) const;

  // Filters each matrix in place on `stream` of the current device: y = scale * Re(ifft2(M * fft2(x))).
  // Returns as soon as everything is queued. `workspace` is device memory, aligned to 256 bytes. With `sum`,
  // the first pass makes the matrix; cuFFT's cannot. Then it holds something unfinished until run_last(), as
  // the norm of what is left is known before the last pass.
  void run(const MatrixList& matrices, double scale, void* workspace, std::size_t bytes, cudaStream_t stream,
           const SumFirst* sum = nullptr) const;

  // The last pass of a run with the same arguments, in the workspace that it has left: to the matrix, or with
  // a base, and the matrix stays as it is.
  void run_last(const MatrixList& matrices, void* workspace, std::size_t bytes, cudaStream_t stream,
                const SumFirst& sum, const AddLast& add) const;

  // Whether a last pass takes these arrays; in double precision, or not aligned, they need one of their own.
  bool adds(const AddLast& add) const;

  Plan plan;  // decimated or full
  DType dtype;
  WindowTables rows{};           // kDecimated
  WindowTables columns{};        // kDecimated; or a whole axis
  ColumnTables column_tables{};  // kFull with fused columns
  SpectrumFilter spectra{};      // in three kernels: of the matrices, or, kDecimated, of their coarse grids
  std::int64_t chunk_rows =
      0;  // kDecimated: rows that a block walks down, for sweeps; 0: what the matrices need
};

}  // namespace freemerge::cuda
