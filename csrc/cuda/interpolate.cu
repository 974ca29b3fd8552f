#include "cuda/interpolate.cuh"
#include "cuda/reduce.cuh"
#include "cuda/storage.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kAhead;
using heuristics::kRowPassBlocks;
using heuristics::kRowPassThreads;

// With sums of squares: float pairs have the bytes of twice as many 16-bit ones, and five blocks would spill.
constexpr int kSquaredAhead = kAhead / 2;
constexpr int kSquaredBlocks = 4;

// Two neighbouring columns of the matrix on the coarse columns: they touch kTaps + 1 of them at most.
template <int kTaps>
struct ColumnPair {
  float first[kTaps];
  float second[kTaps];
  std::int64_t cell;
  bool shifted;  // the second column starts one coarse column later

  __device__ ColumnPair(const WindowTables& window, std::int64_t column, bool has_second) {
    load_weights(window, column, first);
    load_weights(window, has_second ? column + 1 : column, second);
    cell = load(window.cell + column);
    shifted = has_second && load(window.cell + column + 1) != cell;
  }

  __device__ float2 at(const float* line, std::int64_t cells) const {
    float values[kTaps + 1];
#pragma unroll
    for (int j = 0; j <= kTaps; ++j) {
      // As cells >= 2 taps, one period is enough, except for the weights that pad a window.
      const std::int64_t column = cell + j;
      values[j] = load(line + (column < cells ? column : (column < 2 * cells ? column - cells : 0)));
    }
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      sum.x += first[j] * values[j];
      sum.y += second[j] * (shifted ? values[j + 1] : values[j]);
    }
    return sum;
  }
};

// A whole axis: nothing to interpolate.
struct WholePair {
  std::int64_t column;

  __device__ WholePair(const WindowTables&, std::int64_t column_, bool) : column(column_) {}

  __device__ float2 at(const float* line, std::int64_t) const {
    return load(reinterpret_cast<const float2*>(line + column));  // the pitch is even, and so is the column
  }
};

// The sum of squares of what a thread writes, or nothing.
template <bool kWanted>
struct Squares {
  double sum = 0.0;

  __device__ void add(float2 value, bool second) {
    if constexpr (kWanted) {
      const auto x = static_cast<double>(value.x);
      const auto y = second ? static_cast<double>(value.y) : 0.0;
      sum += x * x + y * y;
    }
  }
};

// A thread's two columns of a chunk of rows, of which kRows are on their way from memory at a time.
template <typename T, int kTaps, typename Columns, int kRows, bool kSquares>
__device__ void interpolate_columns(const Interpolate& a, std::int64_t column, Squares<kSquares>& squares) {
  const WindowTables& window = a.rows;
  const std::int64_t width = a.columns.samples;
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  T* matrix = static_cast<T*>(a.matrices.data[blockIdx.z]);
  const PairAccess access = pair_access(matrix, row_stride, column, width);
  matrix += column;
  const float* grid = a.grids.data + static_cast<std::int64_t>(blockIdx.z) * a.grids.rows * a.grids.pitch;
  // The last chunk first: what `spread_rows` read last is still in L2.
  const std::int64_t begin = static_cast<std::int64_t>(gridDim.y - 1 - blockIdx.y) * a.chunk_rows;
  const std::int64_t end = begin + a.chunk_rows < window.samples ? begin + a.chunk_rows : window.samples;
  const float constant = a.center_gain * load(a.centers + blockIdx.z);

  const Columns columns(a.columns, column, access.second);
  const auto coarse_row = [&](std::int64_t cell) {
    return columns.at(grid + wrap(cell, a.grids.rows) * a.grids.pitch, a.grids.columns);
  };
  float2 coarse[kTaps];  // rows cell .. cell + kTaps - 1
  const auto move_to = [&](std::int64_t last_row) {
#pragma unroll
    for (int j = 0; j + 1 < kTaps; ++j) coarse[j] = coarse[j + 1];
    coarse[kTaps - 1] = coarse_row(last_row);
  };
  std::int64_t cell = load(window.cell + begin);
#pragma unroll 1
  for (int j = 0; j + 1 < kTaps; ++j) move_to(cell + j);
  bool fresh = true;  // the cell's last coarse row is still missing
#pragma unroll 1
  for (std::int64_t row = begin; row < end;) {
    const std::int64_t next_cell = load(window.first + cell + 1);
    const std::int64_t cell_end = next_cell < end ? next_cell : end;
    Pair<T> pairs[kRows] = {};
    // A gain of zero must not turn an infinity that is about to be overwritten into NaN.
    if (a.gain != 0.0f) load_rows(matrix, row_stride, row, cell_end, access, pairs);
    if (fresh) move_to(cell + kTaps - 1);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= cell_end) break;
      float weights[kTaps];
      load_weights(window, row + i, weights);
      float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        sum.x += weights[j] * coarse[j].x;
        sum.y += weights[j] * coarse[j].y;
      }
      // The large terms cancel first.
      const float2 old = widen(pairs[i]);
      const float2 value =
          make_float2((a.gain * old.x + constant) + sum.x, (a.gain * old.y + constant) + sum.y);
      store_pair(matrix + (row + i) * row_stride, access, value);
      squares.add(value, access.second);
    }
    row += kRows;
    fresh = row >= cell_end;
    if (fresh) {
      row = cell_end;
      ++cell;
    }
  }
}

template <typename T, int kTaps, typename Columns>
__global__ void __launch_bounds__(kRowPassThreads, kRowPassBlocks) interpolate_kernel(Interpolate a) {
  const std::int64_t column = first_column();
  Squares<false> nothing;
  if (column < a.columns.samples) interpolate_columns<T, kTaps, Columns, kAhead>(a, column, nothing);
}

template <int kTaps, typename Columns>
__global__ void __launch_bounds__(kRowPassThreads, kSquaredBlocks) interpolate_squares_kernel(Interpolate a) {
  const std::int64_t column = first_column();
  Squares<true> squares;
  if (column < a.columns.samples)
    interpolate_columns<float, kTaps, Columns, kSquaredAhead>(a, column, squares);
  const double total = block_sum(squares.sum, shared_memory<double>());
  if (threadIdx.x == 0) store(a.squares + blockIdx.y * gridDim.x + blockIdx.x, total);
}

template <int kTaps, typename Columns>
void launch_kernel(const Interpolate& arguments, const Launch& how) {
  if (arguments.squares) return launch(interpolate_squares_kernel<kTaps, Columns>, how, arguments);
  visit_storage(arguments.matrices.dtype, [&](auto tag) {
    launch(interpolate_kernel<typename decltype(tag)::type, kTaps, Columns>, how, arguments);
  });
}

}  // namespace

void interpolate(const Interpolate& arguments, cudaStream_t stream) {
  const std::int64_t chunks = ceil_div(arguments.rows.samples, arguments.chunk_rows);
  const std::size_t scratch = arguments.squares ? kRowPassThreads / kWarpSize * sizeof(double) : 0;
  const Launch how("interpolate", row_pass_grid(arguments.columns.samples, chunks, arguments.matrices.count),
                   dim3(kRowPassThreads), scratch, stream);
  if (arguments.rows.padded == 8) {
    arguments.columns.whole() ? launch_kernel<8, WholePair>(arguments, how)
                              : launch_kernel<8, ColumnPair<8>>(arguments, how);
  } else {
    arguments.columns.whole() ? launch_kernel<12, WholePair>(arguments, how)
                              : launch_kernel<12, ColumnPair<12>>(arguments, how);
  }
}

}  // namespace freemerge::cuda
