// The mask of the decimated form, on the spectra of the coarse grids.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/mask_gain.cuh"
#include "cuda/spread_columns.cuh"

namespace freemerge::cuda {

struct CoarseMask {
  CoarseGrids grids;  // holding half spectra: columns / 2 + 1 complex numbers of each row that is transformed
  WindowTables rows;
  WindowTables columns;  // or a whole axis, which has no window to undo
  KernelMask mask;
  double background;
  double scale;
  // Of one grid, whose scale is 1, or null: energies[block], what the bins of a block add to the squares of
  // the matrix, by Parseval: (M^2 - background^2) |X|^2 / (H W), mirrored bins included. `center` was taken
  // out of the matrix before.
  double* energies;
  const float* center;
};

// Multiplies each bin inside the band by scale * (M - background) / (H W phi_rows^2 phi_columns^2), phi being
// the windows' transforms, and clears the bins outside it.
void coarse_mask(const CoarseMask& arguments, cudaStream_t stream);

// Of a call with energies.
std::int64_t coarse_mask_blocks(const CoarseGrids& grids);

}  // namespace freemerge::cuda
