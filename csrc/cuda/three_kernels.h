// Matrices through a mask of their spectra without cuFFT: rows to half spectra, their columns through the
// mask, and back.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "common/mask.h"
#include "common/plan.h"
#include "cuda/column_filter.cuh"
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

// The row passes of matrices = scale * Re(ifft2(M * fft2(matrices))); their spectra may lie in their own
// memory.
RowPass row_pass(const SpectrumFilter& filter, const Matrices& matrices, const HalfSpectra& spectra,
                 double scale);

// Everything but the last of them, spectra_to_rows().
void filter_spectra(const SpectrumFilter& filter, const RowPass& rows, cudaStream_t stream,
                    const Energies& energies = {});

// How many energies there are.
std::int64_t energy_count(const SpectrumFilter& filter);

}  // namespace freemerge::cuda
