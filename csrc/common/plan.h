// What a backend is told to do. The planner (python/freemerge/planner/) makes every decision;
// kernels execute.
#pragma once

#include <cstdint>

#include "common/mask.h"

namespace freemerge {

enum class Form : int {
  kDecimated,  // y = background * x + correction whose spectrum lies in a small box: spread onto a coarse
               // grid, FFT, interpolate
  kPruned,     // y = background * x + correction on the columns of the spectrum whose gain varies
  kFull,       // row FFT, column FFT, mask, and back, for any mask
};

struct FormName {
  Form form;
  const char* name;
};

inline constexpr FormName kFormNames[] = {
    {Form::kDecimated, "decimated"}, {Form::kPruned, "pruned"}, {Form::kFull, "full"}};

// Decimation of one axis of n samples to `cells` coarse cells with a Kaiser-Bessel window of `taps` taps; no
// taps leave the axis whole, cells = n.
struct Decimation {
  std::int64_t cells = 0;
  int taps = 0;
  std::int64_t band = 0;  // frequencies less than this many bins from the centre are kept
  bool nyquist = false;   // the band is centred at Nyquist instead of DC
};

inline bool is_whole(const Decimation& axis) { return axis.taps == 0; }

// How many half bins the first frequency at or above the centre of a band lies above it: 1 around Nyquist of
// an odd number of samples, which is between two bins, else 0. Bins are counted from that one, and those of
// |k + half_bin / 2| < band are kept.
FM_HOST_DEVICE inline int half_bin(const Decimation& axis, std::int64_t samples) {
  return axis.nyquist && samples % 2 != 0 ? 1 : 0;
}

// kFull on a GPU, or the coarse grids of kDecimated, in three kernels: rows to spectra, columns, spectra to
// rows. Sizes are those of the matrix, or of the grid.
struct Tiles {
  int parts =
      0;  // rows that one block of the row kernels takes, H / parts apart: columns are that much shorter
  int columns = 0;         // of a block of the column kernel, a power of two
  int row_threads = 0;     // of a block
  int column_threads = 0;  // of a block
  // Points of the convolution that transforms a row, or a part of a column, whose length has a prime factor
  // without a kernel (Bluestein); 0: none.
  int row_chirp = 0;
  int column_chirp = 0;
};

struct Plan {
  Form form = Form::kFull;
  Mask mask;
  // kPruned, kFull: columns are treated as rows
  bool transposed = false;
  bool packed = false;      // kFull: the spectrum is kept in the matrix's own memory; not with transposed
  double background = 0.0;  // gain outside the box (kDecimated) or of the constant columns (kPruned)
  Decimation rows;          // along H
  Decimation columns;       // along W
  bool fused = false;       // kFull on a GPU: columns are transformed and masked by one kernel
  Tiles tiles;  // on a GPU: in three kernels if it has parts; else cuFFT transforms rows, or grids
};

}  // namespace freemerge
