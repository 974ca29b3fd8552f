// What the passes along the rows axis share: a thread owns two neighbouring columns and walks down the rows.
#pragma once

#include <cstdint>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/spread_rows.cuh"
#include "cuda/window_tables.h"

namespace freemerge::cuda {

// Of the two that a thread owns.
__device__ inline std::int64_t first_column() {
  return static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + 2 * static_cast<int>(threadIdx.x);
}

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

// The partial coarse rows that a chunk of samples gives in two columns. sums[j] belongs to coarse row `cell +
// j`; when the first sample of the next cell comes, sums[0] is final and the registers move up by one.
template <int kTaps>
struct PartialRows {
  float* partial;
  std::int64_t pitch;
  std::int32_t cell;  // of the latest sample
  float2 sums[kTaps] = {};

  __device__ PartialRows(float* partial_, std::int64_t pitch_, std::int32_t cell_)
      : partial(partial_), pitch(pitch_), cell(cell_) {}

  __device__ void retire() {
    store(reinterpret_cast<float2*>(partial), sums[0]);
    partial += pitch;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) sums[j] = sums[j + 1];
    sums[kTaps - 1] = make_float2(0.0f, 0.0f);
  }

  __device__ void add(const WindowTables& window, std::int64_t row, std::int32_t cell_of_row, float2 value) {
    if (cell_of_row != cell) retire();
    cell = cell_of_row;
    float weights[kTaps];
    load_weights(window, row, weights);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      sums[j].x += weights[j] * value.x;
      sums[j].y += weights[j] * value.y;
    }
  }

  __device__ void finish(int taps) {
    for (int j = 0; j < taps; ++j) retire();
  }
};

inline dim3 row_pass_grid(std::int64_t width, std::int64_t chunks, int matrices) {
  return dim3(static_cast<unsigned>(ceil_div(width, kColumnsPerBlock)), static_cast<unsigned>(chunks),
              static_cast<unsigned>(matrices));
}

}  // namespace freemerge::cuda
