// What the passes along the rows axis share: a thread owns two neighbouring columns and walks down the rows.
#pragma once

#include <cstdint>

#include "cuda/heuristics.h"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/window_tables.h"

namespace freemerge::cuda {

constexpr int kColumnsPerBlock = 2 * heuristics::kRowPassThreads;

// The weights of one sample are the same for a whole warp: wide loads that hit one line.
template <int kTaps>
__device__ void load_weights(const WindowTables& window, std::int64_t sample, float (&weights)[kTaps]) {
  const float4* source = reinterpret_cast<const float4*>(window.weights + sample * kTaps);
#pragma unroll
  for (int j = 0; j < kTaps / 4; ++j) {
    const float4 four = load(source + j);
    weights[4 * j] = four.x;
    weights[4 * j + 1] = four.y;
    weights[4 * j + 2] = four.z;
    weights[4 * j + 3] = four.w;
  }
}

// The cells of kRows samples from `row` on, of the last one again where they end before.
template <int kRows>
__device__ void load_cells(const WindowTables& window, std::int64_t row, std::int64_t end,
                           std::int32_t (&cells)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) cells[i] = load(window.cell + (row + i < end ? row + i : end - 1));
}

inline dim3 row_pass_grid(std::int64_t width, std::int64_t chunks, int matrices) {
  return dim3(static_cast<unsigned>(ceil_div(width, kColumnsPerBlock)), static_cast<unsigned>(chunks),
              static_cast<unsigned>(matrices));
}

}  // namespace freemerge::cuda
