// Matrices through a mask of their spectra without cuFFT: rows to half spectra, their columns through the
// mask, and back.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "common/mask.h"
#include "common/plan.h"
#include "cuda/column_tables.h"
#include "cuda/half_spectra.h"
#include "cuda/matrices.h"
#include "cuda/row_spectra.cuh"
#include "cuda/task_vectors.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

struct SpectrumFilter {
  Mask mask;
  Tiles tiles;
  RowTables rows;
  ColumnTables columns;
};

// `column_gains`: see ColumnTables.
SpectrumFilter spectrum_filter(const Mask& mask, const Tiles& tiles, const std::vector<float>& column_gains,
                               const Upload& upload);

// matrices = scale * Re(ifft2(M * fft2(matrices))); their spectra may lie in their own memory. With `sum`,
// the matrix is a float one that is that sum first, and `sums` memory for sum_count() numbers.
void filter_spectra(const SpectrumFilter& filter, const Matrices& matrices, const HalfSpectra& spectra,
                    double scale, cudaStream_t stream, const SumFirst* sum = nullptr, double* sums = nullptr);

std::int64_t sum_count(const SpectrumFilter& filter, const SumFirst& sum);

}  // namespace freemerge::cuda
