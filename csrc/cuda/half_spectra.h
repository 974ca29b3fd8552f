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

}  // namespace freemerge::cuda
