#include "cuda/decimate_columns.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"

namespace freemerge::cuda {
namespace {

constexpr int kLanes = 32;
constexpr int kWarps = 8;

// Down: a warp's lanes are 32 coarse rows, so that the weights of a sample are the same for all of them.
constexpr int kDownCells = 32;  // coarse columns of a block
constexpr int kDownChunk = 64;  // samples in shared memory at a time
constexpr int kDownPitch = kLanes + 1;
constexpr int kCellsPerThread = kDownCells / kWarps;

// The samples that start in one cell. Cells below 0 and beyond the last are copies of the grid, and so are
// their samples: position n on the endless line is sample n - shift.
struct CellSamples {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t shift;
};

__device__ CellSamples samples_of(const WindowTables& window, std::int64_t cell) {
  std::int64_t shift = 0;
  for (; cell < 0; cell += window.cells) shift -= window.samples;
  for (; cell >= window.cells; cell -= window.cells) shift += window.samples;
  return {load(window.first + cell) + shift, load(window.first + cell + 1) + shift, shift};
}

__global__ void __launch_bounds__(kLanes* kWarps) down_columns_kernel(ColumnPass a) {
  float* tile = shared_memory<float>();  // tile[sample][row]
  const WindowTables& window = a.window;
  const int lane = static_cast<int>(threadIdx.x);
  const int warp = static_cast<int>(threadIdx.y);
  const std::int64_t row_begin = static_cast<std::int64_t>(blockIdx.y) * kLanes;
  const std::int64_t cell_begin = static_cast<std::int64_t>(blockIdx.x) * kDownCells;
  const std::int64_t cell_end =
      cell_begin + kDownCells < window.cells ? cell_begin + kDownCells : window.cells;
  const float* panel = a.panel + static_cast<std::int64_t>(blockIdx.z) * a.row_count * window.samples;
  const int pitch = padded_taps(window.taps);

  float sums[kCellsPerThread] = {};
  const std::int64_t samples_end = samples_of(window, cell_end - 1).end;
  for (std::int64_t chunk = samples_of(window, cell_begin - window.taps + 1).begin; chunk < samples_end;
       chunk += kDownChunk) {
    for (int r = warp; r < kLanes; r += kWarps) {
      for (int s = lane; s < kDownChunk; s += kLanes) {
        const bool inside = row_begin + r < a.row_count && chunk + s < samples_end;
        const std::int64_t sample = wrap(chunk + s, window.samples);
        tile[s * kDownPitch + r] = inside ? load(panel + (row_begin + r) * window.samples + sample) : 0.0f;
      }
    }
    __syncthreads();
    const std::int64_t chunk_end = chunk + kDownChunk < samples_end ? chunk + kDownChunk : samples_end;
    for (int i = 0; i < kCellsPerThread; ++i) {
      const std::int64_t cell = cell_begin + warp + i * kWarps;
      if (cell >= cell_end) continue;
      for (int j = window.taps - 1; j >= 0; --j) {  // samples that start j cells before this one
        const CellSamples group = samples_of(window, cell - j);
        const std::int64_t begin = group.begin > chunk ? group.begin : chunk;
        const int count = static_cast<int>((group.end < chunk_end ? group.end : chunk_end) - begin);
        const float* weight = window.weights + (begin - group.shift) * pitch + j;
        const float* value = tile + (begin - chunk) * kDownPitch + lane;
        for (int n = 0; n < count; ++n) sums[i] += load(weight + n * pitch) * value[n * kDownPitch];
      }
    }
    __syncthreads();
  }
  const std::int64_t row = row_begin + lane;
  if (row >= a.row_count) return;
  float* grid = a.grids.data + (static_cast<std::int64_t>(blockIdx.z) * a.grids.rows +
                                wrap(a.row_begin + row, a.grids.rows)) *
                                   a.grids.pitch;
  for (int i = 0; i < kCellsPerThread; ++i) {
    const std::int64_t cell = cell_begin + warp + i * kWarps;
    if (cell < cell_end) store(grid + cell, sums[i]);
  }
}

// Up: a thread owns one sample, keeps its weights in registers and serves kUpRows coarse rows.
constexpr int kUpThreads = 256;
constexpr int kUpRows = 16;

template <int kTaps>
__global__ void __launch_bounds__(kUpThreads) up_columns_kernel(ColumnPass a) {
  const WindowTables& window = a.window;
  const std::int64_t sample = static_cast<std::int64_t>(blockIdx.x) * kUpThreads + threadIdx.x;
  if (sample >= window.samples) return;
  float weights[kTaps];
  std::int64_t columns[kTaps];
  const std::int64_t cell = load(window.cell + sample);
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
    weights[j] = load(window.weights + sample * kTaps + j);
    columns[j] = wrap(cell + j, window.cells);
  }
  const float* grid = a.grids.data + static_cast<std::int64_t>(blockIdx.z) * a.grids.rows * a.grids.pitch;
  float* panel = a.panel + static_cast<std::int64_t>(blockIdx.z) * a.row_count * window.samples;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * kUpRows;
  const std::int64_t end = begin + kUpRows < a.row_count ? begin + kUpRows : a.row_count;
  for (std::int64_t row = begin; row < end; ++row) {
    const float* line = grid + wrap(a.row_begin + row, a.grids.rows) * a.grids.pitch;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) sum += weights[j] * load(line + columns[j]);
    store(panel + row * window.samples + sample, sum);
  }
}

}  // namespace

void down_columns(const ColumnPass& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.window.cells, kDownCells)),
                  static_cast<unsigned>(ceil_div(arguments.row_count, kLanes)),
                  static_cast<unsigned>(arguments.grids.count));
  const std::size_t shared = kDownChunk * kDownPitch * sizeof(float);
  launch(down_columns_kernel, Launch("down_columns", grid, dim3(kLanes, kWarps), shared, stream), arguments);
}

void up_columns(const ColumnPass& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.window.samples, kUpThreads)),
                  static_cast<unsigned>(ceil_div(arguments.row_count, kUpRows)),
                  static_cast<unsigned>(arguments.grids.count));
  const Launch how("up_columns", grid, dim3(kUpThreads), 0, stream);
  if (padded_taps(arguments.window.taps) == 8) {
    launch(up_columns_kernel<8>, how, arguments);
  } else {
    launch(up_columns_kernel<12>, how, arguments);
  }
}

}  // namespace freemerge::cuda
