// Tables of a transform whose length has a prime factor without a kernel, as a convolution with a chirp
// (Bluestein): X[k] = c[k] sum_j (c[j] x[j]) / c[k - j] with c[k] = exp(-i pi k^2 / length), because
// 2 j k = j^2 + k^2 - (k - j)^2.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/passes.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

struct Chirp {
  int length;
  const float2* factors;  // c
  // Of 1 / c, over the points of the convolution, where the passes leave each frequency; the convolution's
  // own factor 1 / points is in it.
  const float2* spectrum;
};

// `points` are those of the convolution: at least 2 length - 1, of common radices.
Chirp chirp_tables(std::int64_t length, const Passes& points, const Upload& upload);

}  // namespace freemerge::cuda
