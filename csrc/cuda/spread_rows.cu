#include "cuda/spread_rows.cuh"
#include "cuda/storage.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassThreads;

// sums[j] belongs to coarse row `cell + j`; when the first sample of the next cell comes, sums[0] is final
// and the registers move up by one.
template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads) spread_rows_kernel(SpreadRows a) {
  const WindowTables& window = a.window;
  const std::int64_t column =
      static_cast<std::int64_t>(blockIdx.x) * kColumnsPerBlock + 2 * static_cast<int>(threadIdx.x);
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

  float2 sums[kTaps] = {};
  const auto retire = [&] {
    store(reinterpret_cast<float2*>(partial), sums[0]);
    partial += a.chunks.pitch;
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) sums[j] = sums[j + 1];
    sums[kTaps - 1] = make_float2(0.0f, 0.0f);
  };
  std::int32_t cell = load(window.cell + begin);
  for (std::int64_t row = begin; row < end; row += kAhead) {
    Pair<T> pairs[kAhead];
    load_rows(matrix, row_stride, row, end, access, pairs);
    std::int32_t cells[kAhead];
    load_cells(window, row, end, cells);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (row + i >= end) break;
      if (cells[i] != cell) retire();
      cell = cells[i];
      float weights[kTaps];
      load_weights(window, row + i, weights);
      const float2 wide = widen(pairs[i]);
      const float2 value = make_float2(wide.x - center, wide.y - center);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        sums[j].x += weights[j] * value.x;
        sums[j].y += weights[j] * value.y;
      }
    }
  }
  for (int j = 0; j < window.taps; ++j) retire();
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
