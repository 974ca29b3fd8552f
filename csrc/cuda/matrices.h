// What the filter works on: matrices of one shape and dtype, each somewhere in device memory.
#pragma once

#include <cstdint>

#include "cuda/heuristics.h"
#include "dtype.h"
#include "mask.h"

namespace freemerge::cuda {

// Up to kMatricesPerLaunch matrices as a kernel argument. Columns are contiguous, rows `row_stride` entries
// apart.
struct Matrices {
  void* data[heuristics::kMatricesPerLaunch];
  std::int64_t row_stride[heuristics::kMatricesPerLaunch];
  int count;
  DType dtype;
};

// A Kaiser-Bessel window of one axis in device memory; cpu/window.h says what the tables hold.
struct WindowTables {
  const std::int64_t* first;  // cells + 1
  const std::int32_t* cell;   // samples: the first cell that each sample touches
  const float* weights;       // samples x padded_taps
  const double* transform;    // band
  std::int64_t samples;
  std::int64_t cells;
  std::int64_t band;
  int taps;
  bool nyquist;
};

// Kernels exist for two widths; narrower windows are padded with zero weights.
constexpr int kMaxTaps = 12;
FM_HOST_DEVICE inline int padded_taps(int taps) { return taps <= 8 ? 8 : kMaxTaps; }

}  // namespace freemerge::cuda
