// mask_gain() on any bin: csrc/common/mask.h defines it on the stored half of the spectrum, and M(k, l) =
// M(-k, -l). Compile with -fmad=false: a fused multiply-add would move bins that lie exactly on a cutoff.
#pragma once

#include "common/mask.h"
#include "cuda/launch_math.h"

namespace freemerge::cuda {

__device__ inline double gain_at(const Mask& mask, std::int64_t bin_y, std::int64_t bin_x) {
  if (bin_x <= mask.width / 2) return mask_gain(mask, bin_y, bin_x);
  return mask_gain(mask, wrap(-bin_y, mask.height), mask.width - bin_x);
}

}  // namespace freemerge::cuda
