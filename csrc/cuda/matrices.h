// What the filter works on: matrices of one shape and dtype, each somewhere in device memory.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/mask.h"
#include "cuda/heuristics.h"

namespace freemerge::cuda {

// Up to kMatricesPerLaunch matrices as a kernel argument. Columns are contiguous, rows `row_stride` entries
// apart.
struct Matrices {
  void* data[heuristics::kMatricesPerLaunch];
  std::int64_t row_stride[heuristics::kMatricesPerLaunch];
  int count;
  DType dtype;
};

// A Kaiser-Bessel window of one axis in device memory; cpu/window.h says what the first tables hold. A whole
// axis (no taps, as many cells as samples) has no tables.
struct WindowTables {
  const std::int64_t* first;  // cells + 1
  const std::int32_t* cell;   // samples: the first cell that each sample touches
  const float* weights;       // samples x padded
  const std::int32_t* start;  // cells: the first sample that touches each; negative, counted from the end
  const float* gathered;      // reach x cells: the weight of sample start[c] + k in cell c, or 0
  const double* transform;    // band
  std::int64_t samples;
  std::int64_t cells;
  std::int64_t band;
  std::int64_t reach;
  int taps;
  int padded;  // 8 or 12, the same for both axes
  bool nyquist;

  FM_HOST_DEVICE bool whole() const { return taps == 0; }
};

// Kernels exist for two widths; narrower windows are padded with zero weights.
constexpr int kMaxTaps = 12;
inline int padded_taps(int taps) { return taps <= 8 ? 8 : kMaxTaps; }

}  // namespace freemerge::cuda
