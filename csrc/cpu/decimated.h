// The decimated form of the filter, for masks that are constant outside a small box of frequencies around DC
// or Nyquist: y = scale * (background * x + correction), where the correction's spectrum lies in the box. The
// box may be as wide as the spectrum: rows are then left whole.
#pragma once

#include "common/plan.h"
#include "cpu/kernels.h"
#include "cpu/matrices.h"

namespace freemerge {

// In place, every matrix X becomes scale * Re IFFT2(M * FFT2(X)). Arithmetic is float; float64 is refused.
//
// The matrix is read twice and written once. Beside it there are the box's coarse spectrum, 8 * rows.cells *
// columns.band bytes, and per thread about 32 rows of floats.
//
// Results do not depend on `threads`. Throws std::invalid_argument before anything is written.
void filter_decimated(const Plan& plan, const Matrices& matrices, double scale, int threads,
                      const Kernels& kernels);

}  // namespace freemerge
