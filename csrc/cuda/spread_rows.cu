#include "cuda/spread_rows.cuh"
#include "cuda/storage.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassThreads;

template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kRowPassBlocks<kTaps>) spread_rows_kernel(SpreadRows a) {
  const WindowTables& window = a.window;
  const std::int64_t column = first_column<kColumnsPerThread>();
  if (column >= a.width) return;
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  const T* matrix = static_cast<const T*>(a.matrices.data[blockIdx.z]);
  const QuadAccess access = quad_access(matrix, row_stride, column, a.width);
  const int chunk = static_cast<int>(a.chunks.begin) + static_cast<int>(blockIdx.y);
  const int begin = chunk_begin(a.chunks, chunk);
  const int end = chunk_end(a.chunks, chunk, window);
  const float center = load(a.centers + blockIdx.z);

  const std::int64_t chunk_of_panel = blockIdx.z * (a.chunks.end - a.chunks.begin) + blockIdx.y;
  PartialRows<kTaps, kColumnsPerThread> partial(
      a.partials + chunk_of_panel * a.chunks.reach * a.chunks.pitch + column, a.chunks.pitch);
  matrix += column;
  const std::int64_t* next = window.first + load(window.cell + begin) + 1;
#pragma unroll 1
  for (int row = begin; row < end; ++next) {
    const auto next_row = static_cast<int>(load(next));
    const int cell_end = next_row < end ? next_row : end;
#pragma unroll 1
    for (; row < cell_end; row += kAhead) {
      Quad<T> quads[kAhead];
      load_rows(matrix + row * row_stride, row_stride, cell_end - row, access, quads);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i >= cell_end) break;
        Quad<float> values;
#pragma unroll
        for (int c = 0; c < kColumnsPerThread; ++c) values.entries[c] = widen(quads[i].entries[c]) - center;
        partial.add(window, row + i, values);
      }
    }
    row = cell_end;
    partial.end_cell();
  }
  partial.finish(window.taps);
}

}  // namespace

void spread_rows(const SpreadRows& arguments, cudaStream_t stream) {
  const dim3 grid =
      row_pass_grid(arguments.width, arguments.chunks.end - arguments.chunks.begin, arguments.matrices.count);
  const Launch how("spread_rows", grid, dim3(kRowPassThreads), 0, stream);
  visit_storage(arguments.matrices.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    visit_taps(arguments.window.taps,
               [&](auto taps) { launch(spread_rows_kernel<T, decltype(taps)::value>, how, arguments); });
  });
}

}  // namespace freemerge::cuda
