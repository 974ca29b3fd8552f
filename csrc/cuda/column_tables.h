// What the fused column filter needs of a mask and a column length, in device memory.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "common/mask.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

struct ColumnTables {
  const float* gains;  // for each bin of a row, the gain of its column, or NaN where that varies
  // For each bin of a row, how many rows from frequency 0 on have the first gain of a mask of steps, and how
  // many the first or the second; null for other masks.
  const int2* steps;
  const float2* roots;  // of the length of a part: exp(-2 pi i k / length)
};

ColumnTables column_tables(const Mask& mask, const std::vector<float>& gains, int parts,
                           const Upload& upload);

}  // namespace freemerge::cuda
