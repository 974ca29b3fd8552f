#include <algorithm>

#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/spread_columns.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kLanes = 32;  // neighbouring coarse columns
constexpr int kWarps = 8;   // they share the samples of a column
constexpr int kRows = kWarps;
constexpr int kSegment = 1024;  // samples in shared memory at a time
constexpr int kStaged = 4;      // samples that a lane brings there together
constexpr int kSumThreads = 256;

// Calls visit(partial row) for each one that coarse row `cell` is the sum of, in a fixed order.
template <typename Visit>
__device__ void for_each_partial(const SpreadColumns& a, int cell, Visit visit) {
  const auto rows = static_cast<unsigned>(a.chunks.rows);
  const auto begin = static_cast<int>(a.chunks.begin);
  const auto end = static_cast<int>(a.chunks.end);
  const auto cells = static_cast<int>(a.rows.cells);
  const float* panel = a.partials + static_cast<std::int64_t>(blockIdx.z) * (a.chunks.end - a.chunks.begin) *
                                        a.chunks.reach * a.chunks.pitch;
  const int least = cell - a.rows.taps + 1;  // the first cell whose samples touch this one
  // Cells below 0 are the last ones, one period earlier.
#pragma unroll 1
  for (int period = least < 0 ? 1 : 0; period >= 0; --period) {
    const int low = period ? least + cells : (least < 0 ? 0 : least);
    const int high = period ? cells : cell + 1;
    int chunk = static_cast<int>(static_cast<unsigned>(load(a.rows.first + low)) / rows);
    int last = static_cast<int>(static_cast<unsigned>(load(a.rows.first + high) - 1) / rows);
    if (chunk < begin) chunk = begin;
    if (last >= end) last = end - 1;
#pragma unroll 1
    for (; chunk <= last; ++chunk) {
      const int offset = cell + period * cells - load(a.rows.cell + chunk * a.chunks.rows);
      visit(panel + ((chunk - begin) * a.chunks.reach + offset) * a.chunks.pitch);
    }
  }
}

__device__ float* grid_entry(const SpreadColumns& a, std::int64_t cell, std::int64_t column) {
  return a.grids.data + blockIdx.z * a.grids.step + cell * a.grids.pitch + column;
}

__global__ void __launch_bounds__(kSumThreads) sum_partials_kernel(SpreadColumns a) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  if (column >= a.grids.columns) return;
  for (std::int64_t i = blockIdx.y; i < a.row_count; i += gridDim.y) {
    const auto cell = static_cast<int>(wrap(a.row_begin + i, a.grids.rows));
    float sum = 0.0f;
    for_each_partial(a, cell, [&](const float* row) { sum += load(row + column); });
    float* entry = grid_entry(a, cell, column);
    store(entry, load(entry) + sum);
  }
}

// The index of a sample of the periodic axis that is at most one period outside it.
__device__ int wrap_once(int sample, int samples) {
  return sample < 0 ? sample + samples : (sample < samples ? sample : sample - samples);
}

// A skipped entry every 32 keeps equally spaced lanes in different banks.
__device__ int padded_offset(int sample) { return sample + sample / 32; }

// Brings samples [begin, end) of a coarse row to shared memory.
__device__ void stage_row(const SpreadColumns& a, int cell, int begin, int end, float* line) {
  const auto samples = static_cast<int>(a.columns.samples);
  for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += kLanes * kStaged) {
    float staged[kStaged] = {};
    for_each_partial(a, cell, [&](const float* row) {
#pragma unroll
      for (int i = 0; i < kStaged; ++i) {
        const int sample = first + i * kLanes;
        if (sample < end) staged[i] += load(row + wrap_once(sample, samples));
      }
    });
#pragma unroll
    for (int i = 0; i < kStaged; ++i) {
      if (first + i * kLanes < end) line[padded_offset(first + i * kLanes - begin)] = staged[i];
    }
  }
}

// Each warp brings one coarse row; then lanes are coarse columns, and the warps share the samples of a column
// among them.
__global__ void __launch_bounds__(kLanes* kWarps, 4) spread_columns_kernel(SpreadColumns a) {
  float* shared = shared_memory<float>();
  const WindowTables& window = a.columns;
  const int lane = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.y);
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) * kLanes;
  const std::int64_t last_column =
      first_column + kLanes < window.cells ? first_column + kLanes - 1 : window.cells - 1;
  const std::int64_t column = first_column + lane < window.cells ? first_column + lane : last_column;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.y) * kRows + warp;
  const auto cell = static_cast<int>(wrap(a.row_begin + row, a.grids.rows));
  const int start = load(window.start + column);
  const int reach = static_cast<int>(window.reach);
  const int span_begin = load(window.start + first_column);
  const int span_end = load(window.start + last_column) + reach;
  const int pitch = padded_offset(kSegment);

  float sums[kRows] = {};
  for (int segment = span_begin; segment < span_end; segment += kSegment) {
    const int segment_end = segment + kSegment < span_end ? segment + kSegment : span_end;
    if (row < a.row_count) stage_row(a, cell, segment, segment_end, shared + warp * pitch);
    __syncthreads();
    const int begin = segment > start ? segment - start : 0;
    const int end = segment_end - start < reach ? segment_end - start : reach;
#pragma unroll 4
    for (int k = begin + warp; k < end; k += kWarps) {
      const float weight = load(window.spread + k * window.cells + column);
      const float* value = shared + padded_offset(start + k - segment);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] += weight * value[r * pitch];
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) shared[(r * kWarps + warp) * kLanes + lane] = sums[r];
  __syncthreads();
  if (row >= a.row_count || first_column + lane >= window.cells) return;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared[(warp * kWarps + w) * kLanes + lane];
  float* entry = grid_entry(a, cell, column);
  store(entry, load(entry) + sum);
}

}  // namespace

void spread_columns(const SpreadColumns& arguments, cudaStream_t stream) {
  const auto matrices = static_cast<unsigned>(arguments.grids.count);
  if (arguments.columns.whole()) {
    const dim3 grid(static_cast<unsigned>(ceil_div(arguments.grids.columns, kSumThreads)),
                    static_cast<unsigned>(std::min<std::int64_t>(arguments.row_count, 65535)), matrices);
    launch(sum_partials_kernel, Launch("sum_partials", grid, dim3(kSumThreads), 0, stream), arguments);
    return;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.columns.cells, kLanes)),
                  static_cast<unsigned>(ceil_div(arguments.row_count, kRows)), matrices);
  const std::size_t floats = std::max(kRows * (kSegment + kSegment / 32), kRows * kWarps * kLanes);
  launch(spread_columns_kernel,
         Launch("spread_columns", grid, dim3(kLanes, kWarps), floats * sizeof(float), stream), arguments);
}

}  // namespace freemerge::cuda
