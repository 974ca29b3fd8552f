// The mask of the decimated form as a filter of the coarse grids alone: see coarse_mask.cuh.
#pragma once

#include <vector>

#include "common/plan.h"
#include "cuda/three_kernels.h"

namespace freemerge::cuda {

// The coarse grids' own filter, whose mask is a table: (M - background) / (phi_rows^2 phi_columns^2) inside
// the band, as much as the grids are smaller than the matrices, and 0 outside it.
SpectrumFilter coarse_filter(const Plan& plan, const Upload& upload);

}  // namespace freemerge::cuda
