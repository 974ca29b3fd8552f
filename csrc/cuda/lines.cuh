// The general form's way between matrices, lines and spectrum. A line is a row of a matrix, or a column if
// the plan is transposed: what the real transforms run along. A stage holds a run of lines of all matrices
// (flattened: matrix * lines + line), `pitch` floats each, for in-place real transforms.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/matrices.h"

namespace freemerge::cuda {

struct Stage {
  float* data;
  std::int64_t length;      // samples of a line
  std::int64_t pitch;       // 2 * (length / 2 + 1)
  std::int64_t lines;       // lines of one matrix
  std::int64_t line_begin;  // flattened
  std::int64_t line_count;
};

struct LineCopy {
  Matrices matrices;
  bool transposed;
  Stage stage;
  float gain;
};

// stage = matrices, widened to float
void pack(const LineCopy& arguments, cudaStream_t stream);

// matrices = gain * matrices + stage, rounded to the storage dtype
void unpack(const LineCopy& arguments, cudaStream_t stream);

// Some columns of the half spectra, each one contiguous: spectrum[matrix][i][line] is bin bins[i] of that
// line.
struct Spectrum {
  float2* data;
  const std::int32_t* bins;   // column_count, ascending
  const std::int32_t* place;  // for each bin of a line, its i, or -1
  std::int64_t column_count;
};

struct SpectrumCopy {
  Stage stage;  // holding half spectra of its lines
  Spectrum spectrum;
};

// spectrum = the stage's bins in those columns
void gather(const SpectrumCopy& arguments, cudaStream_t stream);

// The stage's bins = spectrum, zero in all other columns
void scatter(const SpectrumCopy& arguments, cudaStream_t stream);

}  // namespace freemerge::cuda
