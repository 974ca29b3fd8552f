// What a filter works on.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace freemerge {

// Matrices of one shape, plan.mask.height x plan.mask.width, rows `row_stride` elements apart and contiguous.
struct Matrices {
  std::vector<void*> data;
  DType dtype;
  std::int64_t row_stride;
};

}  // namespace freemerge
