// Half spectra of the rows of several matrices, in the matrices' own memory or elsewhere.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/heuristics.h"

namespace freemerge::cuda {

// Bins 0 .. width / 2 - 1 of a row are side by side. Bin width / 2 is apart, because a row of a real matrix
// has no room for it.
struct HalfSpectra {
  float* data[heuristics::kMatricesPerLaunch];
  std::int64_t pitch[heuristics::kMatricesPerLaunch];  // floats from row to row
  float2* last[heuristics::kMatricesPerLaunch];        // bin width / 2 of row 0
  std::int64_t last_pitch;                             // complex numbers from row to row
  std::int64_t height;
  std::int64_t width;
  int count;
};

// The same of the rows of all matrices in one piece of memory, or these rows themselves:
// data[matrix][row][bin], `pitch` complex numbers or 2 * `pitch` floats from row to row.
struct Spectra {
  float2* data;
  std::int64_t height;
  std::int64_t width;
  std::int64_t pitch;  // at least width / 2 + 1, where the rows are here
  int count;
};

inline HalfSpectra half_spectra(const Spectra& spectra) {
  HalfSpectra half{};
  half.height = spectra.height;
  half.width = spectra.width;
  half.count = spectra.count;
  half.last_pitch = spectra.pitch;
  for (int i = 0; i < spectra.count; ++i) {
    float2* first = spectra.data + i * spectra.height * spectra.pitch;
    half.data[i] = reinterpret_cast<float*>(first);
    half.pitch[i] = 2 * spectra.pitch;
    half.last[i] = first + spectra.width / 2;
  }
  return half;
}

}  // namespace freemerge::cuda
