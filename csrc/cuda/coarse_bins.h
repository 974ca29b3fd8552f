// The rows of coarse grids and of their spectra.
//
// Real transforms have whole bins only. Where the band lies around Nyquist of an odd height, between two
// bins, as many rows of zeros follow those of the grid: the odd bins of both together are its half bins, and
// a spectrum that has no others transforms back to the grid and, behind it, the grid negated.
#pragma once

#include <cstdint>

#include "common/plan.h"
#include "cuda/launch_math.h"

namespace freemerge::cuda {

// Rows of a coarse grid as it is transformed.
FM_HOST_DEVICE inline std::int64_t grid_rows(const Decimation& axis, std::int64_t height) {
  return axis.cells * (1 + half_bin(axis, height));
}

struct CoarseBin {
  bool inside;            // the band
  std::int64_t distance;  // from the centre of the band, as phi's transform in common/window.h is stored
  std::int64_t y;         // the bin of the matrix
};

// What row `row` of a coarse grid's spectrum stands for.
FM_HOST_DEVICE inline CoarseBin coarse_bin(std::int64_t row, const Decimation& axis, std::int64_t height) {
  const int half = half_bin(axis, height);
  const std::int64_t bin = half ? row / 2 : row;
  const std::int64_t dy = bin <= axis.cells / 2 ? bin : bin - axis.cells;
  const std::int64_t distance = dy < 0 ? -dy - half : dy;
  const bool exists = half == 0 || row % 2 != 0;
  return {exists && distance < axis.band, distance,
          wrap(dy + (axis.nyquist ? (height + half) / 2 : 0), height)};
}

}  // namespace freemerge::cuda
