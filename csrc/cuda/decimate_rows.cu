#include "cuda/decimate_rows.cuh"
#include "cuda/heuristics.h"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kColumnsPerThread;
using heuristics::kRowPassThreads;

constexpr int kColumnsPerBlock = kRowPassThreads * kColumnsPerThread;

template <typename Pass>
struct Job {
  Pass pass;
  std::int64_t cells_per_block;
};

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

// Each thread owns kColumnsPerThread columns and walks down the rows. sums[.][j] belongs to coarse row `cell
// + j`; when the last sample that starts in `cell` is in, sums[.][0] is final and the registers move up by
// one.
template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads) down_rows_kernel(Job<DownRows> job) {
  const DownRows& a = job.pass;
  const WindowTables& window = a.window;
  const T* matrix = static_cast<const T*>(a.matrices.data[blockIdx.z]);
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  float* panel = a.panel + static_cast<std::int64_t>(blockIdx.z) * a.cell_count * a.width;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + threadIdx.x;
  const std::int64_t begin = a.cell_begin + static_cast<std::int64_t>(blockIdx.y) * job.cells_per_block;
  const std::int64_t panel_end = a.cell_begin + a.cell_count;
  const std::int64_t end = begin + job.cells_per_block < panel_end ? begin + job.cells_per_block : panel_end;

  const float center = load(a.centers + blockIdx.z);

  float sums[kColumnsPerThread][kTaps] = {};
  for (std::int64_t cell = begin - window.taps + 1; cell < end; ++cell) {
    const std::int64_t start = wrap(cell, window.cells);
    const std::int64_t last = load(window.first + start + 1);
#pragma unroll 4
    for (std::int64_t n = load(window.first + start); n < last; ++n) {
      float weights[kTaps];
      load_weights(window, n, weights);
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const std::int64_t x = column + c * kRowPassThreads;
        const float value = x < a.width ? widen(load(matrix + n * row_stride + x)) - center : 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) sums[c][j] += weights[j] * value;
      }
    }
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const std::int64_t x = column + c * kRowPassThreads;
      if (cell >= begin && x < a.width) store(panel + (cell - a.cell_begin) * a.width + x, sums[c][0]);
#pragma unroll
      for (int j = 0; j + 1 < kTaps; ++j) sums[c][j] = sums[c][j + 1];
      sums[c][kTaps - 1] = 0.0f;
    }
  }
}

template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads) up_rows_kernel(Job<UpRows> job) {
  const UpRows& a = job.pass;
  const WindowTables& window = a.window;
  T* matrix = static_cast<T*>(a.matrices.data[blockIdx.z]);
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  const std::int64_t panel_rows = a.cell_count + kTaps - 1;
  const float* panel = a.panel + static_cast<std::int64_t>(blockIdx.z) * panel_rows * a.width;
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + threadIdx.x;
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.y) * job.cells_per_block;  // within the panel
  const std::int64_t end =
      begin + job.cells_per_block < a.cell_count ? begin + job.cells_per_block : a.cell_count;
  const float constant = a.center_gain * load(a.centers + blockIdx.z);

  float coarse[kColumnsPerThread][kTaps] =
      {};  // coarse rows cell .. cell + kTaps - 1 of this thread's columns
#pragma unroll
  for (int c = 0; c < kColumnsPerThread; ++c) {
    const std::int64_t x = column + c * kRowPassThreads;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j)
      coarse[c][j + 1] = x < a.width ? load(panel + (begin + j) * a.width + x) : 0.0f;
  }
  for (std::int64_t cell = begin; cell < end; ++cell) {
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      const std::int64_t x = column + c * kRowPassThreads;
#pragma unroll
      for (int j = 0; j + 1 < kTaps; ++j) coarse[c][j] = coarse[c][j + 1];
      coarse[c][kTaps - 1] = x < a.width ? load(panel + (cell + kTaps - 1) * a.width + x) : 0.0f;
    }
    const std::int64_t start = a.cell_begin + cell;
    const std::int64_t last = load(window.first + start + 1);
#pragma unroll 4
    for (std::int64_t n = load(window.first + start); n < last; ++n) {
      float weights[kTaps];
      load_weights(window, n, weights);
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        const std::int64_t x = column + c * kRowPassThreads;
        if (x >= a.width) continue;
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kTaps; ++j) sum += weights[j] * coarse[c][j];
        T* entry = matrix + n * row_stride + x;
        // A gain of zero must not turn an infinity that is about to be overwritten into NaN.
        const float kept = a.gain == 0.0f ? 0.0f : a.gain * widen(load(entry));
        store(entry, narrow<T>((kept + constant) + sum));  // the large ones cancel first
      }
    }
  }
}

template <typename Pass>
dim3 grid_of(const Job<Pass>& job) {
  const Pass& pass = job.pass;
  return dim3(static_cast<unsigned>(ceil_div(pass.width, kColumnsPerBlock)),
              static_cast<unsigned>(ceil_div(pass.cell_count, job.cells_per_block)),
              static_cast<unsigned>(pass.matrices.count));
}

template <typename Pass, template <typename, int> class Kernel>
void run(const char* name, const Pass& pass, cudaStream_t stream) {
  const Job<Pass> job{pass, cells_per_block(pass.width, pass.cell_count, pass.matrices.count)};
  const Launch how(name, grid_of(job), dim3(kRowPassThreads), 0, stream);
  visit_storage(pass.matrices.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (padded_taps(pass.window.taps) == 8) {
      launch(Kernel<T, 8>::function, how, job);
    } else {
      launch(Kernel<T, 12>::function, how, job);
    }
  });
}

template <typename T, int kTaps>
struct DownKernel {
  static constexpr auto function = down_rows_kernel<T, kTaps>;
};

template <typename T, int kTaps>
struct UpKernel {
  static constexpr auto function = up_rows_kernel<T, kTaps>;
};

}  // namespace

std::int64_t cells_per_block(std::int64_t width, std::int64_t cell_count, int matrices) {
  const std::int64_t side_by_side = ceil_div(width, kColumnsPerBlock) * matrices;
  std::int64_t cells = heuristics::kMaxCellsPerBlock;
  while (cells > heuristics::kMinCellsPerBlock &&
         side_by_side * ceil_div(cell_count, cells) < heuristics::kBlocksWanted)
    cells /= 2;
  // The grid has at most 65535 blocks on this axis.
  return cell_count > cells * 65535 ? ceil_div(cell_count, 65535) : cells;
}

void down_rows(const DownRows& arguments, cudaStream_t stream) {
  run<DownRows, DownKernel>("down_rows", arguments, stream);
}

void up_rows(const UpRows& arguments, cudaStream_t stream) {
  run<UpRows, UpKernel>("up_rows", arguments, stream);
}

}  // namespace freemerge::cuda
