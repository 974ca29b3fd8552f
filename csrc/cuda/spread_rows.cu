#include "cuda/spread_rows.cuh"
#include "cuda/storage.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassThreads;

template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads) spread_rows_kernel(SpreadRows a) {
  const WindowTables& window = a.window;
  const std::int64_t column = first_column();
  if (column >= a.width) return;
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  const T* matrix = static_cast<const T*>(a.matrices.data[blockIdx.z]);
  const PairAccess access = pair_access(matrix, row_stride, column, a.width);
  matrix += column;
  const std::int64_t chunk_count = a.chunks.end - a.chunks.begin;
  const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.z) * chunk_count + blockIdx.y;
  float* partial = a.partials + chunk * a.chunks.reach * a.chunks.pitch + column;
  const std::int64_t begin = (a.chunks.begin + blockIdx.y) * a.chunks.rows;
  const std::int64_t end = begin + a.chunks.rows < window.samples ? begin + a.chunks.rows : window.samples;
  const float center = load(a.centers + blockIdx.z);

  PartialRows<kTaps> rows(partial, a.chunks.pitch, load(window.cell + begin));
  for (std::int64_t row = begin; row < end; row += kAhead) {
    Pair<T> pairs[kAhead] = {};
    load_rows(matrix, row_stride, row, end, access, pairs);
    std::int32_t cells[kAhead];
    load_cells(window, row, end, cells);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i >= end) break;
      const float2 wide = widen(pairs[i]);
      rows.add(window, row + i, cells[i], make_float2(wide.x - center, wide.y - center));
    }
  }
  rows.finish(window.taps);
}

}  // namespace

void spread_rows(const SpreadRows& arguments, cudaStream_t stream) {
  const dim3 grid =
      row_pass_grid(arguments.width, arguments.chunks.end - arguments.chunks.begin, arguments.matrices.count);
  const Launch how("spread_rows", grid, dim3(kRowPassThreads), 0, stream);
  visit_storage(arguments.matrices.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(arguments.window.padded == 8 ? spread_rows_kernel<T, 8> : spread_rows_kernel<T, 12>, how,
           arguments);
  });
}

}  // namespace freemerge::cuda
