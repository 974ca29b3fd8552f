// The decimated form of the filter on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/decimated.h"
#include "plan.h"

namespace freemerge {

// In place, for matrices of the plan's shape with rows `row_stride` elements apart: y = scale * filtered(x).
// Accuracy is that of float arithmetic; the bytes do not depend on `threads`.
void filter_decimated(const std::vector<void*>& matrices, DType dtype, const Plan& plan, std::int64_t row_stride,
                      double scale, int threads, const DecimatedKernels& kernels);

}  // namespace freemerge
