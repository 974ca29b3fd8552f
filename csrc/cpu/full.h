// The full and pruned forms of the filter: real transforms along one axis, complex ones along the other for
// the columns of the half spectrum that need it, the mask, and back.
#pragma once

#include <memory>
#include <vector>

#include "cpu/filter.h"

namespace freemerge {

// Arithmetic is float (double for float64) and the result is rounded once. plan.transposed: real transforms
// run along the columns, and "columns" below are the mask's rows.
//
// kFull takes any mask. If plan.packed, float32 and float64 matrices keep their spectrum in their own memory;
// the extra memory is a few batches of signals per thread. Else it takes 8 bytes (16 for float64) per bin
// that M does not zero, up to the size of the matrix in the arithmetic type. A spectrum of bfloat16 or
// float16 never fits: correctly rounded results need it in float.
//
// kPruned is for masks of which many columns are equal to plan.background throughout, at least one: a matrix
// X becomes scale * (background * X + Re IFFT2((M - background) * FFT2(X))). Only the other columns are
// transformed both ways; they take 8 bytes per bin of extra memory.
std::unique_ptr<Filter> make_full_filter(const Plan& plan, DType dtype, std::vector<double> column_gains,
                                         const Kernels& kernels);

}  // namespace freemerge
