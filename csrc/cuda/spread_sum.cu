#include "cuda/reduce.cuh"
#include "cuda/sample_mean.cuh"
#include "cuda/spread_sum.cuh"
#include "cuda/weighted_sum.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kTileRows;

constexpr int kColumns = 2;  // of a thread: more warps have more of the models on their way
constexpr int kThreads = kColumnsPerBlock / kColumns;
constexpr int kBlocks = heuristics::kSumPassBlocks;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kSampleThreads = 64;
static_assert(kColumnsPerBlock == kWarpSize * kEntries, "a warp takes a row of a tile");

// Tiles of kTileRows rows: warps add up one row after the other, eight columns a lane; then each thread
// spreads its columns of all of them.
template <int kTaps>
__global__ void __launch_bounds__(kThreads, kBlocks) spread_sum_kernel(SpreadSum a) {
  float* tile = shared_memory<float>();                                           // tile[row][column]
  double* sums = reinterpret_cast<double*>(tile + kTileRows * kColumnsPerBlock);  // sums[i][thread]
  const WindowTables& window = a.window;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const std::int64_t column = first_column<kColumns>();
  const std::int64_t warp_column = static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + kEntries * lane;
  const int chunk = static_cast<int>(a.chunks.begin) + static_cast<int>(blockIdx.y);
  const int begin = chunk_begin(a.chunks, chunk);
  const int end = chunk_end(a.chunks, chunk, window);
  const bool has_columns = column < a.width;
  const float center = load(a.center);

  for (int m = 0; m < a.vectors.count; ++m) sums[m * kThreads + thread] = 0.0;
  double squares = 0.0;
  PartialRows<kTaps, kColumns> rows(a.partials + blockIdx.y * a.chunks.reach * a.chunks.pitch + column,
                                    a.chunks.pitch);
  int cell = load(window.cell + begin);
  int cell_end = static_cast<int>(load(window.first + cell + 1));
  for (int row = begin; row < end; row += kTileRows) {
#pragma unroll 1
    for (int i = warp; i < kTileRows && row + i < end; i += kWarps) {
      const std::int64_t first = (row + i) * a.width + warp_column;
      const std::int64_t row_end = first - warp_column + a.width;
      float sum[kEntries] = {};
      add_weighted(a.vectors, first, row_end, true, sum,
                   [&](int m, double magnitudes) { sums[m * kThreads + thread] += magnitudes; });
      store_entries({a.sum, DType::kFloat32}, first, row_end, sum);
      float4* line = reinterpret_cast<float4*>(tile + i * kColumnsPerBlock + kEntries * lane);
      line[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      line[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
#pragma unroll
      for (int e = 0; e < kEntries; ++e) squares += squared(sum[e]);
    }
    __syncthreads();
    if (has_columns) {
#pragma unroll 1
      for (int i = 0; i < kTileRows && row + i < end; ++i) {
        if (row + i == cell_end) {
          rows.end_cell();
          cell_end = static_cast<int>(load(window.first + ++cell + 1));
        }
        auto values =
            reinterpret_cast<const Neighbours<float, kColumns>*>(tile + i * kColumnsPerBlock)[thread];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) values.entries[c] -= center;
        rows.add(window, row + i, values);
      }
    }
    __syncthreads();
  }
  if (has_columns) {
    rows.end_cell();
    rows.finish(window.taps);
  }
  sums[a.vectors.count * kThreads + thread] = squares;
  __syncthreads();
  for (int m = warp; m <= a.vectors.count; m += kWarps) {
    double total = 0.0;
    for (int i = lane; i < kThreads; i += kWarpSize) total += sums[m * kThreads + i];
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
      kTileRows * kColumnsPerBlock * sizeof(float) +
      static_cast<std::size_t>(arguments.vectors.count + 1) * kThreads * sizeof(double);
  const dim3 grid = row_pass_grid(arguments.width, arguments.chunks.end - arguments.chunks.begin, 1);
  visit_taps(arguments.window.taps, [&](auto taps) {
    launch(spread_sum_kernel<decltype(taps)::value>,
           Launch("spread_sum", grid, dim3(kThreads), shared, stream), arguments);
  });
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
