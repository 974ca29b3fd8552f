// What a backend is told to do. The planner (python/freemerge/planner/) makes every decision;
// kernels execute.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace freemerge {

enum class Form : int {
  kScale = 0,      // the mask is one constant: y = background * x
  kDecimated = 1,  // y = background * x + correction whose spectrum lies in a small box: windowed FIR, coarse
                   // FFT, FIR back
  kPruned = 2,     // y = background * x + correction on the columns of the spectrum whose gain varies
  kFull = 3,       // row FFT, column FFT, mask, and back, for any mask
};

// Decimation of one axis of n samples to `cells` coarse cells with a Kaiser-Bessel window of `taps` taps; no
// taps leave the axis whole, cells = n.
struct Decimation {
  std::int64_t cells = 0;
  int taps = 0;
  std::int64_t band = 0;  // offsets |k| < band from the centre are kept
  bool nyquist = false;   // the band is centred at Nyquist instead of DC (only when n is even)
};

inline bool is_whole(const Decimation& axis) { return axis.taps == 0; }

struct Plan {
  Form form = Form::kScale;
  Mask mask;
  // kPruned, kFull: treat columns as rows (column classes are taken along the other axis)
  bool transposed = false;
  bool packed = false;  // kFull: the spectrum is kept in the matrix's own memory; not with transposed
  double background =
      0.0;  // gain outside the box (kDecimated) or of the constant columns (kPruned), or everywhere (kScale)
  Decimation rows;     // along H
  Decimation columns;  // along W
};

}  // namespace freemerge
