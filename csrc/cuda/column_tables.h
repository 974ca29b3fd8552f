// What the fused column filter needs of a mask and a column length, in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "common/mask.h"
#include "cuda/chirp.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

struct ColumnTables {
  const float* gains;  // for each bin of a row, the gain of its column, or NaN where that varies
  // For each bin of a row, how many rows from frequency 0 on have the first gain of a mask of steps, and how
  // many the first or the second; null for other masks.
  const int2* steps;
  const float2* roots;  // of the passes' length: exp(-2 pi i k / length)
  Chirp chirp;          // of the length of a part; empty where the passes transform it
  // Of coarse grids, whose mask is a table, another such table: what the square of each bin, mirrored or not,
  // adds to those of the matrix beside its background; and how much of the mean that was taken out of the
  // matrix is missing in the first bin. Else null: what is written tells.
  const float* energies;
  double center_share;
};

// `chirp`: points of the convolution, or 0.
ColumnTables column_tables(const Mask& mask, const std::vector<float>& gains, int parts, int chirp,
                           const Upload& upload);

}  // namespace freemerge::cuda
