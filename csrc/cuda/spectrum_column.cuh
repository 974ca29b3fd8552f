// Access to half spectra from kernels.
#pragma once

#include <cstdint>

#include "cuda/half_spectra.h"
#include "cuda/kernel.cuh"

namespace freemerge::cuda {

// One bin of all rows.
struct SpectrumColumn {
  float* first;
  std::int64_t pitch;  // floats
  bool together;       // real and imaginary parts may be moved by one access

  __device__ SpectrumColumn(const HalfSpectra& spectra, int index, std::int64_t bin) {
    const bool is_last = bin == spectra.width / 2;
    first = is_last ? reinterpret_cast<float*>(spectra.last[index]) : spectra.data[index] + 2 * bin;
    pitch = is_last ? 2 * spectra.last_pitch : spectra.pitch[index];
    together = reinterpret_cast<std::uintptr_t>(first) % sizeof(float2) == 0 && pitch % 2 == 0;
  }

  __device__ float2 get(std::int64_t row) const {
    const float* value = first + row * pitch;
    if (together) return load(reinterpret_cast<const float2*>(value));
    return make_float2(load(value), load(value + 1));
  }

  __device__ void put(std::int64_t row, float2 number) const {
    float* value = first + row * pitch;
    if (together) {
      store(reinterpret_cast<float2*>(value), number);
    } else {
      store(value, number.x);
      store(value + 1, number.y);
    }
  }
};

}  // namespace freemerge::cuda
