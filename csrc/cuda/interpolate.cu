#include "cuda/interpolate.cuh"
#include "cuda/reduce.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassThreads;
using heuristics::kSumPassBlocks;

// The sum of squares of what a thread writes, or nothing.
template <bool kWanted>
struct Squares {
  double sum = 0.0;

  __device__ void add(const Quad<float>& values, int count) {
    if constexpr (kWanted) {
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) {
        if (c < count) sum += squared(values.entries[c]);
      }
    }
  }
};

// A thread's columns of a chunk of rows.
template <typename T, int kTaps, bool kSquares>
__device__ void interpolate_columns(const Interpolate& a, std::int64_t column, int chunk,
                                    Squares<kSquares>& squares) {
  const WindowTables& window = a.window;
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  T* matrix = static_cast<T*>(a.matrices.data[blockIdx.z]);
  const QuadAccess access = quad_access(matrix, row_stride, column, a.width);
  // A gain of zero must not turn an infinity that is about to be overwritten into NaN.
  const QuadAccess read = a.gain != 0.0f ? access : QuadAccess{false, 0};
  const int begin = chunk_begin(a.chunks, chunk);
  const int end = chunk_end(a.chunks, chunk, window);
  matrix += column;
  const float constant = a.center_gain * load(a.centers + blockIdx.z);

  const float* lines = a.lines.data + blockIdx.z * a.lines.step + column;
  const auto coarse_row = [&](int cell) {
    const int line = wrap_ahead(cell - static_cast<int>(a.lines.begin), static_cast<int>(a.lines.count));
    return load(reinterpret_cast<const Quad<float>*>(lines + line * a.lines.pitch));
  };
  // The last cell first: what `spread_rows` read last is still in L2.
  int cell = load(window.cell + end - 1);
  Quad<float> coarse[kTaps];  // rows cell .. cell + kTaps - 1
#pragma unroll
  for (int j = 0; j + 1 < kTaps; ++j) coarse[j] = coarse_row(cell + 1 + j);
#pragma unroll 1
  for (int cell_end = end; cell_end > begin; --cell) {
#pragma unroll
    for (int j = kTaps - 1; j > 0; --j) coarse[j] = coarse[j - 1];
    coarse[0] = coarse_row(cell);
    const auto first_row = static_cast<int>(load(window.first + cell));
    const int cell_begin = first_row > begin ? first_row : begin;
#pragma unroll 1
    for (int row = cell_begin; row < cell_end; row += kAhead) {
      T* entries = matrix + row * row_stride;
      Quad<T> quads[kAhead];
      load_rows(entries, row_stride, cell_end - row, read, quads);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (row + i >= cell_end) break;
        float weights[kTaps];
        load_weights(window, row + i, weights);
        Quad<float> values;
#pragma unroll
        for (int c = 0; c < kColumnsPerThread; ++c) {
          float sum = 0.0f;
#pragma unroll
          for (int j = 0; j < kTaps; ++j) sum += weights[j] * coarse[j].entries[c];
          // The large terms cancel first.
          values.entries[c] = (a.gain * widen(quads[i].entries[c]) + constant) + sum;
        }
        store_quad(entries + i * row_stride, access, values);
        squares.add(values, access.count);
      }
    }
    cell_end = cell_begin;
  }
}

// The last chunk first, too.
__device__ inline int reversed_chunk(const RowChunks& chunks) {
  return static_cast<int>(chunks.end) - 1 - static_cast<int>(blockIdx.y);
}

template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kRowPassBlocks<kTaps>) interpolate_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  Squares<false> nothing;
  if (column < a.width) interpolate_columns<T, kTaps>(a, column, reversed_chunk(a.chunks), nothing);
}

template <int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kSumPassBlocks) interpolate_squares_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  const int chunk = reversed_chunk(a.chunks);
  Squares<true> squares;
  if (column < a.width) interpolate_columns<float, kTaps>(a, column, chunk, squares);
  const double total = block_sum(squares.sum, shared_memory<double>());
  if (threadIdx.x == 0) store(a.squares + chunk * static_cast<int>(gridDim.x) + blockIdx.x, total);
}

}  // namespace

void interpolate(const Interpolate& arguments, cudaStream_t stream) {
  const std::size_t scratch = arguments.squares ? kRowPassThreads / kWarpSize * sizeof(double) : 0;
  const Launch how(
      "interpolate",
      row_pass_grid(arguments.width, arguments.chunks.end - arguments.chunks.begin, arguments.matrices.count),
      dim3(kRowPassThreads), scratch, stream);
  visit_taps(arguments.window.taps, [&](auto taps) {
    constexpr int kTaps = decltype(taps)::value;
    if (arguments.squares) return launch(interpolate_squares_kernel<kTaps>, how, arguments);
    visit_storage(arguments.matrices.dtype, [&](auto tag) {
      launch(interpolate_kernel<typename decltype(tag)::type, kTaps>, how, arguments);
    });
  });
}

}  // namespace freemerge::cuda
