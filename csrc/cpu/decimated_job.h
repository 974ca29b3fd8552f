// What the kernels of the decimated filter work on, and their three stages:
//
//   gather       down columns and along rows, windowed FIR onto the coarse grid; transform the coarse rows
//   and keep
//                the box's columns
//   respond      transform those columns, multiply by the mask's departure from c, and back
//   interpolate  transform the coarse rows back, the adjoint FIR along rows and columns, and the one write
//
// V is the matrix; c the gain outside the box.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/window.h"
#include "cpu/box_gain.h"
#include "cpu/fft.h"

namespace freemerge {

// One matrix and its tables, as plain pointers and sizes for the kernels.
struct DecimatedJob {
  void* data;
  DType dtype;
  std::int64_t height, width, stride;
  float background;

  Taper row_taper, column_taper;  // over the height, over the width
  Decimation rows, columns;
  const Fft<float>* row_fft;     // along coarse rows: columns.cells points
  const Fft<float>* column_fft;  // down coarse columns: rows.cells points
  BoxGainView gain;
  float scale;  // of the gains; the background has it already

  // Blocks of `lanes` box columns, each rows.cells elements of 2 * lanes floats (re, im).
  float* spectrum;
};

// A band is a group of 2 * lanes coarse rows; a block is a group of `lanes` columns of the box.
struct DecimatedKernels {
  int lanes;
  std::int64_t (*scratch_floats)(const DecimatedJob& job);
  void (*gather)(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band, float* scratch);
  void (*respond)(const DecimatedJob& job, std::int64_t first_block, std::int64_t last_block, float* scratch);
  void (*interpolate)(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band,
                      float* scratch);
};

// Taps the kernels are compiled for.
inline constexpr int kMinTaps = 6;
inline constexpr int kMaxTaps = 9;
// Coarse rows come in whole bands of the widest instruction set.
inline constexpr std::int64_t kRowCellsMultiple = 32;

}  // namespace freemerge
