// What the passes along the rows axis share: a thread owns a few neighbouring columns and walks down the
// rows, cell by cell: the coarse rows that it holds move through its registers only where a cell ends.
#pragma once

#include <cstdint>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/spread_rows.cuh"
#include "cuda/storage.cuh"
#include "cuda/window_tables.h"

namespace freemerge::cuda {

// Of the kColumns that a thread owns.
template <int kColumns>
__device__ std::int64_t first_column() {
  return static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + kColumns * static_cast<int>(threadIdx.x);
}

// Blocks that fit a multiprocessor, which bounds their registers.
template <int kTaps>
constexpr int kRowPassBlocks = kTaps <= 10 ? 8 : 6;

// The rows of a chunk.
__device__ inline int chunk_begin(const RowChunks& chunks, int chunk) {
  return chunk * static_cast<int>(chunks.rows);
}

__device__ inline int chunk_end(const RowChunks& chunks, int chunk, const WindowTables& window) {
  const int end = chunk_begin(chunks, chunk + 1);
  return end < window.samples ? end : static_cast<int>(window.samples);
}

// The weights of one sample are the same for a whole warp: wide loads that hit one line.
template <int kTaps>
__device__ void load_weights(const WindowTables& window, std::int64_t sample, float (&weights)[kTaps]) {
  const float* source = window.weights + sample * padded_taps(kTaps);
#pragma unroll
  for (int j = 0; j < kTaps; j += 4) {
    if (j + 4 <= kTaps) {
      const float4 four = load(reinterpret_cast<const float4*>(source + j));
      weights[j] = four.x;
      weights[j + 1] = four.y;
      weights[j + 2] = four.z;
      weights[j + 3] = four.w;
    } else {
      const float2 two = load(reinterpret_cast<const float2*>(source + j));
      weights[j] = two.x;
      weights[j + 1] = two.y;
    }
  }
}

// How many of a thread's entries of one row exist, and whether one access may take them all.
struct QuadAccess {
  bool together;
  int count;
};

template <typename T>
__device__ QuadAccess quad_access(const T* matrix, std::int64_t row_stride, std::int64_t column,
                                  std::int64_t width) {
  const bool all = column + kColumnsPerThread <= width;
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(matrix) % sizeof(Quad<T>) == 0 && row_stride % kColumnsPerThread == 0;
  return {all && aligned, all ? kColumnsPerThread : static_cast<int>(width - column)};
}

// Those of `rows` rows, kRows at most; zeros in columns that do not exist. Nothing waits for a load until all
// are on their way.
template <typename T, int kRows>
__device__ void load_rows(const T* first, std::int64_t row_stride, int rows, QuadAccess access,
                          Quad<T> (&quads)[kRows]) {
  if (access.together) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i >= rows) break;
      quads[i] = load(reinterpret_cast<const Quad<T>*>(first + i * row_stride));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (i >= rows) break;
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c)
      quads[i].entries[c] = c < access.count ? load(first + c) : T{};
    first += row_stride;
  }
}

template <typename T>
__device__ void store_quad(T* address, QuadAccess access, const Quad<float>& values) {
  Quad<T> quad;
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) quad.entries[c] = narrow<T>(values.entries[c]);
  if (access.together) return store(reinterpret_cast<Quad<T>*>(address), quad);
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) {
    if (c < access.count) store(address + c, quad.entries[c]);
  }
}

// The partial coarse rows that a chunk of samples gives in kColumns columns. sums[j] belongs to the j-th
// coarse row that the samples of a cell touch; where the cell ends, sums[0] is final and the others move up.
template <int kTaps, int kColumns>
struct PartialRows {
  using Values = Neighbours<float, kColumns>;

  float* partial;
  std::int64_t pitch;
  Values sums[kTaps] = {};

  __device__ PartialRows(float* partial_, std::int64_t pitch_) : partial(partial_), pitch(pitch_) {}

  __device__ void add(const WindowTables& window, std::int64_t row, const Values& values) {
    float weights[kTaps];
    load_weights(window, row, weights);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums[j].entries[c] += weights[j] * values.entries[c];
    }
  }

  __device__ void end_cell() {
    store(reinterpret_cast<Values*>(partial), sums[0]);
    partial += pitch;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) sums[j] = sums[j + 1];
    sums[kTaps - 1] = {};
  }

  // Behind the last cell.
  __device__ void finish(int taps) {
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) {
      if (j + 1 >= taps) break;
      store(reinterpret_cast<Values*>(partial + j * pitch), sums[j]);
    }
  }
};

inline dim3 row_pass_grid(std::int64_t width, std::int64_t chunks, int matrices) {
  return dim3(static_cast<unsigned>(ceil_div(width, kColumnsPerBlock)), static_cast<unsigned>(chunks),
              static_cast<unsigned>(matrices));
}

}  // namespace freemerge::cuda
