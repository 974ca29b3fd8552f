// The window of one axis in device memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/mask.h"
#include "common/plan.h"
#include "cuda/upload.h"

namespace freemerge::cuda {

// common/window.h defines first, weights and transform. A whole axis (no taps, as many cells as samples) has
// no tables.
struct WindowTables : Decimation {
  const std::int64_t* first;  // cells + 1
  const std::int32_t* cell;   // samples: the first cell that each touches
  const float* weights;       // samples x padded_taps(taps)
  const std::int32_t* start;  // cells: the first sample that touches each; negative, counted from the end
  const float* spread;        // reach x cells: the weight of sample start[c] + k in cell c, or 0
  const double* transform;    // band
  std::int64_t samples;
  std::int64_t reach;

  FM_HOST_DEVICE bool whole() const { return taps == 0; }
};

// Kernels exist for windows of 8, 10 and 12 taps; narrower ones are padded with zero weights.
constexpr int kMaxTaps = 12;
FM_HOST_DEVICE constexpr int kernel_taps(int taps) { return taps <= 8 ? 8 : (taps <= 10 ? 10 : kMaxTaps); }

// Calls visit(kernel_taps(taps), as a constant).
template <typename Visit>
void visit_taps(int taps, Visit visit) {
  switch (kernel_taps(taps)) {
    case 8:
      return visit(std::integral_constant<int, 8>{});
    case 10:
      return visit(std::integral_constant<int, 10>{});
    default:
      return visit(std::integral_constant<int, kMaxTaps>{});
  }
}

// Floats from one sample's weights to the next one's, in whole 16-byte words.
FM_HOST_DEVICE constexpr int padded_taps(int taps) { return taps <= 8 ? 8 : kMaxTaps; }

// The rows axis is spread sample by sample, without `start` and `spread`; the columns axis cell by cell.
WindowTables row_window(std::int64_t samples, const Decimation& axis, const Upload& upload);
WindowTables column_window(std::int64_t samples, const Decimation& axis, const Upload& upload);

}  // namespace freemerge::cuda
