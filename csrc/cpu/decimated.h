// The decimated form of the filter, for masks that are constant outside a small box of frequencies around DC
// or Nyquist: y = scale * (background * x + correction), where the correction's spectrum lies in the box. The
// box may span one axis of the spectrum, which is then left whole.
#pragma once

#include <memory>

#include "cpu/filter.h"

namespace freemerge {

// Arithmetic is float; float64 is refused.
//
// A matrix is read twice and written once. Beside it there are the box's coarse spectrum, 8 * rows.cells *
// columns.band bytes, and per thread about 32 rows of floats.
std::unique_ptr<Filter> make_decimated_filter(const Plan& plan, DType dtype, const DecimatedKernels& kernels);

}  // namespace freemerge
