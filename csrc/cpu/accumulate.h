// Task vectors v_i = theta_i - theta_0: their weighted sum and mean magnitude in one pass over the stored
// weights.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"

namespace freemerge {

// A contiguous array in its storage dtype.
struct Storage {
  const void* data;
  DType dtype;
};

// mean_j |v_i[j]| for each model, and sum_j out[j]^2 as square_sum gives it, or 0 where it was not asked for.
struct Accumulated {
  std::vector<double> means;
  double squares;
};

// out[j] = sum_i weights[i] * v_i[j].
//
// Arithmetic is double when any input is double, else float, and `out` (n entries, or null for the means
// alone) has that type. Products are rounded before they are added, model after model: the order and rounding
// of the same formula in torch ops, so both give the same bytes. The means are double sums over fixed blocks
// in a fixed order: the same for any thread count. A mean is not finite exactly when some v_i is not (or a
// double sum overflows). `out` must not overlap the inputs.
Accumulated accumulate(void* out, Storage base, const std::vector<Storage>& models,
                       const std::vector<double>& weights, bool squares, std::int64_t n, int threads);

// out[j] = round(base[j] + scale * (factor * delta[j])) to out_dtype, products and sum rounded to double when
// base or delta is double, else to float. `out` may be `base` or `delta` itself if the dtypes are the same.
// Whether all of it is finite is the return value.
bool add_round(void* out, DType out_dtype, Storage base, Storage delta, double scale, double factor,
               std::int64_t n, int threads);

// What the weighted entries of either sign add up to, and what their |weights| do, or null. All of n entries
// in the type of the arithmetic.
struct Election {
  void* sums[2];  // of positive and of negative entries
  void* shares[2];
};

// Magnitudes in float that count: from `least` on, and below `outlier` unless that is infinite.
struct Magnitudes {
  float least;
  float outlier;
};

// Adds weight * delta[j], where |delta[j]| is in `range`, to the sum of its sign, and |weight| to the share;
// all in the dtype of delta, float or double. Products are rounded before they are added. Both sums may be
// one.
void elect(const Election& election, Storage delta, double weight, Magnitudes range, std::int64_t n,
           int threads);

// Ends an election: sums[0] becomes the sum whose sign the sum of both has, over its share if there are any,
// and 0 where that is 0. In `dtype`, float or double.
void decide(const Election& election, DType dtype, std::int64_t n, int threads);

// sum_j x[j]^2 in double, over fixed blocks in a fixed order: the same for any thread count.
double square_sum(Storage x, std::int64_t n, int threads);

}  // namespace freemerge
