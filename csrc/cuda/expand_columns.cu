#include "cuda/expand_columns.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 2;  // of a thread, which touch kTaps + 1 coarse ones at most
constexpr int kRows = 16;    // of a block

template <int kTaps>
__global__ void __launch_bounds__(kThreads) expand_columns_kernel(ExpandColumns a) {
  const auto width = static_cast<int>(a.window.samples);
  const auto cells = static_cast<int>(a.grids.columns);
  const int column = kColumns * (static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x));
  if (column >= width) return;
  const int cell = load(a.window.cell + column);
  float weights[kColumns][kTaps + 1];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int sample = column + c < width ? column + c : column;
    const int shift = load(a.window.cell + sample) - cell;
#pragma unroll
    for (int j = 0; j <= kTaps; ++j) {
      const bool touched = j >= shift && j - shift < kTaps;
      weights[c][j] = touched ? load(a.window.weights + sample * padded_taps(kTaps) + j - shift) : 0.0f;
    }
  }
  const auto begin = static_cast<int>(blockIdx.y) * kRows;
  const int end = begin + kRows < a.lines.count ? begin + kRows : static_cast<int>(a.lines.count);
  float* line = a.lines.data + blockIdx.z * a.lines.step + begin * a.lines.pitch + column;
  const float* grid = a.grids.data + blockIdx.z * a.grids.step;
  int row = wrap_ahead(static_cast<int>(a.lines.begin) + begin, static_cast<int>(a.grids.rows));
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    const float* source = grid + row * a.grids.pitch;
    Neighbours<float, kColumns> sums{};
    const auto add = [&](int j, float value) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sums.entries[c] += weights[c][j] * value;
    };
    if (cell + kTaps < cells) {
#pragma unroll
      for (int j = 0; j <= kTaps; ++j) add(j, load(source + cell + j));
    } else {
#pragma unroll
      for (int j = 0; j <= kTaps; ++j) add(j, load(source + wrap_ahead(cell + j, cells)));
    }
    store(reinterpret_cast<Neighbours<float, kColumns>*>(line), sums);
    line += a.lines.pitch;
    row = row + 1 < a.grids.rows ? row + 1 : 0;
  }
}

}  // namespace

void expand_columns(const ExpandColumns& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.window.samples, kColumns * kThreads)),
                  static_cast<unsigned>(ceil_div(arguments.lines.count, kRows)),
                  static_cast<unsigned>(arguments.grids.count));
  visit_taps(arguments.window.taps, [&](auto taps) {
    launch(expand_columns_kernel<decltype(taps)::value>,
           Launch("expand_columns", grid, dim3(kThreads), 0, stream), arguments);
  });
}

}  // namespace freemerge::cuda
