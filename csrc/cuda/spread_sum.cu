#include "cuda/reduce.cuh"
#include "cuda/sample_mean.cuh"
#include "cuda/spread_sum.cuh"
#include "cuda/weighted_sum.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassBlocks;
using heuristics::kRowPassThreads;

constexpr int kWarps = kRowPassThreads / kWarpSize;
constexpr int kSampleThreads = 64;
static_assert(kColumnsPerBlock == kWarpSize * kEntries, "a warp takes a row of a tile");

// Tiles of kAhead rows: warps add up one row after the other, eight columns a lane; then each thread spreads
// its two columns of all of them.
template <int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kRowPassBlocks) spread_sum_kernel(SpreadSum a) {
  float* tile = shared_memory<float>();                                        // tile[row][column]
  double* sums = reinterpret_cast<double*>(tile + kAhead * kColumnsPerBlock);  // sums[i][thread]
  const WindowTables& window = a.window;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const std::int64_t column = first_column();
  const std::int64_t warp_column = static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + kEntries * lane;
  const std::int64_t chunk = a.chunks.begin + blockIdx.y;
  const std::int64_t begin = chunk * a.chunks.rows;
  const std::int64_t end = begin + a.chunks.rows < window.samples ? begin + a.chunks.rows : window.samples;
  const bool has_columns = column < a.width;
  const float center = load(a.center);

  for (int m = 0; m < a.vectors.count; ++m) sums[m * kRowPassThreads + thread] = 0.0;
  double squares = 0.0;
  PartialRows<kTaps> rows(a.partials + blockIdx.y * a.chunks.reach * a.chunks.pitch + column, a.chunks.pitch,
                          load(window.cell + begin));
  for (std::int64_t row = begin; row < end; row += kAhead) {
#pragma unroll 1
    for (int i = warp; i < kAhead && row + i < end; i += kWarps) {
      const std::int64_t first = (row + i) * a.width + warp_column;
      const std::int64_t row_end = (row + i + 1) * a.width;
      float sum[kEntries] = {};
      add_weighted(a.vectors, first, row_end, true, sum,
                   [&](int m, double magnitudes) { sums[m * kRowPassThreads + thread] += magnitudes; });
      store_entries({a.sum, DType::kFloat32}, first, row_end, sum);
      float4* line = reinterpret_cast<float4*>(tile + i * kColumnsPerBlock + kEntries * lane);
      line[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      line[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
#pragma unroll
      for (int e = 0; e < kEntries; ++e) squares += squared(sum[e]);
    }
    __syncthreads();
    if (has_columns) {
      std::int32_t cells[kAhead];
      load_cells(window, row, end, cells);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i >= end) break;
        const float2 value = reinterpret_cast<const float2*>(tile + i * kColumnsPerBlock)[thread];
        rows.add(window, row + i, cells[i], make_float2(value.x - center, value.y - center));
      }
    }
    __syncthreads();
  }
  if (has_columns) rows.finish(window.taps);
  sums[a.vectors.count * kRowPassThreads + thread] = squares;
  __syncthreads();
  for (int m = warp; m <= a.vectors.count; m += kWarps) {
    double total = 0.0;
    for (int i = lane; i < kRowPassThreads; i += kWarpSize) total += sums[m * kRowPassThreads + i];
    total = warp_sum(total);
    if (lane == 0) store(a.sums + m * a.blocks + chunk * gridDim.x + blockIdx.x, total);
  }
}

struct SampleSum {
  TaskVectors vectors;
  std::int64_t row_step;  // in entries
  std::int64_t column_step;
  int rows;
  int columns;
  float* samples;
};

__global__ void __launch_bounds__(kSampleThreads) sample_sum_kernel(SampleSum a) {
  const int i = static_cast<int>(blockIdx.x) * kSampleThreads + static_cast<int>(threadIdx.x);
  if (i >= a.rows * a.columns) return;
  const std::int64_t entry = i / a.columns * a.row_step + i % a.columns * a.column_step;
  float sum[kEntries] = {};
  add_weighted(a.vectors, entry, entry + 1, true, sum, [](int, double) {});
  store(a.samples + i, sum[0]);
}

}  // namespace

void spread_sum(const SpreadSum& arguments, cudaStream_t stream) {
  const std::size_t shared =
      kAhead * kColumnsPerBlock * sizeof(float) +
      static_cast<std::size_t>(arguments.vectors.count + 1) * kRowPassThreads * sizeof(double);
  const dim3 grid = row_pass_grid(arguments.width, arguments.chunks.end - arguments.chunks.begin, 1);
  launch(arguments.window.padded == 8 ? spread_sum_kernel<8> : spread_sum_kernel<12>,
         Launch("spread_sum", grid, dim3(kRowPassThreads), shared, stream), arguments);
}

void sample_sum(const TaskVectors& vectors, std::int64_t height, std::int64_t width, float* samples,
                cudaStream_t stream) {
  const int rows = sample_rows(height);
  const int columns = sample_columns(width);
  const auto blocks = static_cast<unsigned>(ceil_div(rows * columns, kSampleThreads));
  launch(sample_sum_kernel, Launch("sample_sum", dim3(blocks), dim3(kSampleThreads), 0, stream),
         SampleSum{vectors, height / rows * width, width / columns, rows, columns, samples});
}

}  // namespace freemerge::cuda
