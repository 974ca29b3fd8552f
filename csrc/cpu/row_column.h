// The full and pruned forms of the filter: real transforms along one axis, complex ones along the other for
// the columns of the half spectrum that need it, the mask, and back.
#pragma once

#include "common/plan.h"
#include "cpu/kernels.h"
#include "cpu/matrices.h"

namespace freemerge {

// In place, every matrix X becomes scale * Re IFFT2(M * FFT2(X)), for any mask M.
//
// Arithmetic is float (double for float64) and the result is rounded once. If plan.packed, float32 and
// float64 matrices keep their spectrum in their own memory; the extra memory is a few batches of signals per
// thread. Else it takes 8 bytes (16 for float64) per bin that M does not zero, up to the size of the matrix
// in the arithmetic type. A spectrum of bfloat16 or float16 never fits: correctly rounded results need it in
// float.
//
// plan.transposed: real transforms run along the columns. Results do not depend on `threads`. Throws
// std::invalid_argument before anything is written.
void filter_full(const Plan& plan, const Matrices& matrices, double scale, int threads,
                 const Kernels& kernels);

// The same result where many columns of the mask (rows, if plan.transposed) are equal to plan.background
// throughout: X becomes scale * (background * X + Re IFFT2((M - background) * FFT2(X))). Only the other
// columns are transformed both ways; they take 8 bytes per bin of extra memory. Throws
// std::invalid_argument unless at least one column is.
void filter_pruned(const Plan& plan, const Matrices& matrices, double scale, int threads,
                   const Kernels& kernels);

}  // namespace freemerge
