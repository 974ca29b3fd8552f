// What the kernels of the decimated filter work on, and its three stages:
//
//   spread       windows down the rows axis and along the columns axis, from V to the coarse grid; transform
//                the coarse rows and keep the box's columns
//   coarse_mask  transform those columns, multiply by M - c, and back
//   interpolate  transform the coarse rows back, the adjoint windows along both axes, and the one write
//
// V is the matrix, M the mask, c its gain outside the box.
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
  std::int64_t width, stride;
  float background;
  float mean, mean_result;  // y = background * (x - mean) + the correction of x - mean + mean_result

  WindowView row_window, column_window;
  Decimation rows, columns;      // along the height, along the width
  const Fft<float>* row_fft;     // along coarse rows: columns.cells points
  const Fft<float>* column_fft;  // down coarse columns: rows.cells points
  const float* turns;  // of coarse rows, around Nyquist of an odd height: pairs (cos, sin); else null
  BoxGainView gain;
  float scale;  // of the gains; the background has it already

  // Blocks of `lanes` box columns, each rows.cells elements of 2 * lanes floats (re, im).
  float* spectrum;
};

// A band is a group of 2 * lanes coarse rows; a block is a group of `lanes` columns of the box.
struct DecimatedKernels {
  int lanes;
  std::int64_t (*work_floats)(const DecimatedJob& job);
  void (*spread)(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band, float* work);
  void (*coarse_mask)(const DecimatedJob& job, std::int64_t first_block, std::int64_t last_block,
                      float* work);
  void (*interpolate)(const DecimatedJob& job, std::int64_t first_band, std::int64_t last_band, float* work);
};

// Taps the kernels are compiled for.
inline constexpr int kMinTaps = 6;
inline constexpr int kMaxTaps = 9;
// Coarse rows come in whole bands of the widest instruction set.
inline constexpr std::int64_t kRowCellsMultiple = 2 * kMaxLanes;

}  // namespace freemerge
