// The gains of csrc/common/mask.h as kernels compute them. Compile with -fmad=false: a fused multiply-add
// would move bins that lie exactly on a cutoff.
#pragma once

#include "common/mask.h"

namespace freemerge::cuda {

// A mask as a kernel's argument.
struct KernelMask : Mask {
  KernelMask(const Mask& mask) : Mask(mask), smooth(mask) {}

  // In float: doubles would take longer than all else at a bin.
  FM_HOST_DEVICE float smooth_gain(std::int64_t bin_y, std::int64_t bin_x) const {
    return smooth.gain<float>(squared_radius(*this, bin_y, bin_x));
  }

  SmoothMask smooth;
};

// factor * M at a stored bin.
FM_HOST_DEVICE inline float scaled_gain(const KernelMask& m, double factor, std::int64_t bin_y,
                                        std::int64_t bin_x) {
  return is_smooth(m.kind) ? static_cast<float>(factor) * m.smooth_gain(bin_y, bin_x)
                           : static_cast<float>(factor * other_gain(m, bin_y, bin_x));
}

// M at any bin.
FM_HOST_DEVICE inline double gain_at(const KernelMask& m, std::int64_t bin_y, std::int64_t bin_x) {
  const auto [y, x] = stored_bin(m, bin_y, bin_x);
  return is_smooth(m.kind) ? static_cast<double>(m.smooth_gain(y, x)) : other_gain(m, y, x);
}

}  // namespace freemerge::cuda
