#include <type_traits>

#include "cuda/interpolate.cuh"
#include "cuda/reduce.cuh"
#include "cuda/window_pass.cuh"

namespace freemerge::cuda {
namespace {

using heuristics::kRowPassThreads;
using heuristics::kSumPassBlocks;

// What becomes of the values of a thread's columns, of which kAhead rows at most are expected at a time: they
// go back to the matrix;
struct WriteBack {
  static constexpr int kAhead = heuristics::kAhead;

  __device__ void expect(int, int) {}

  template <typename T>
  __device__ void write(T* entries, QuadAccess access, int, const Quad<float>& values) {
    store_quad(entries, access, values);
  }
};

// the same, and their squares are added up;
struct WriteSquares {
  static constexpr int kAhead = heuristics::kAhead;

  double sum = 0.0;

  __device__ void expect(int, int) {}

  __device__ void write(float* entries, QuadAccess access, int, const Quad<float>& values) {
    store_quad(entries, access, values);
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      if (c < access.count) sum += squared(values.entries[c]);
    }
  }
};

// Calls visit(first entry) in an array's dtype; the branch is the same for all threads.
template <typename Visit>
__device__ void visit_entries(const Array& array, Visit visit) {
  if (array.dtype == DType::kFloat32) {
    visit(static_cast<float*>(array.data));
  } else if (array.dtype == DType::kBFloat16) {
    visit(static_cast<__nv_bfloat16*>(array.data));
  } else {
    visit(static_cast<__half*>(array.data));
  }
}

// or they are added to a base, four of a row in one access.
struct WriteAdded {
  static constexpr int kAhead = heuristics::kAheadWithBase;
  static constexpr QuadAccess kTogether{true, kColumnsPerThread};

  const AddLast& job;
  std::int64_t width;
  std::int64_t column;
  std::int64_t first = 0;    // entry of the rows that are expected
  Quad<float> base[kAhead];  // of these rows

  __device__ WriteAdded(const Interpolate& a, std::int64_t column_)
      : job(a.add), width(a.width), column(column_) {}

  __device__ void expect(int row, int rows) {
    first = row * width + column;
    visit_entries(job.base, [&](auto* entries) {
      Quad<std::remove_pointer_t<decltype(entries)>> quads[kAhead];
      load_rows(entries + first, width, rows, kTogether, quads);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (i >= rows) break;
#pragma unroll
        for (int c = 0; c < kColumnsPerThread; ++c) base[i].entries[c] = widen(quads[i].entries[c]);
      }
    });
  }

  __device__ void write(float*, QuadAccess, int i, const Quad<float>& values) {
    Quad<float> sums;
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c)
      sums.entries[c] =
          __fadd_rn(base[i].entries[c], __fmul_rn(job.scale, __fmul_rn(job.factor, values.entries[c])));
    visit_entries(job.out, [&](auto* entries) { store_quad(entries + first + i * width, kTogether, sums); });
  }
};

// A thread's columns of a chunk of rows.
template <typename T, int kTaps, typename Write>
__device__ void interpolate_columns(const Interpolate& a, std::int64_t column, int chunk, Write& result) {
  constexpr int kAhead = Write::kAhead;
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

  const float* lines = a.lines.data + blockIdx.z * a.lines.count * a.lines.pitch + column;
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
      result.expect(row, cell_end - row);
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
        result.write(entries + i * row_stride, access, i, values);
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
  WriteBack result;
  if (column < a.width) interpolate_columns<T, kTaps>(a, column, reversed_chunk(a.chunks), result);
}

template <int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kSumPassBlocks) interpolate_added_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  WriteAdded result(a, column);
  if (column < a.width) interpolate_columns<float, kTaps>(a, column, reversed_chunk(a.chunks), result);
}

template <int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kSumPassBlocks) interpolate_squares_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  const int chunk = reversed_chunk(a.chunks);
  WriteSquares result;
  if (column < a.width) interpolate_columns<float, kTaps>(a, column, chunk, result);
  const double total = block_sum(result.sum, shared_memory<double>());
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
    if (arguments.add.out.data) return launch(interpolate_added_kernel<kTaps>, how, arguments);
    if (arguments.squares) return launch(interpolate_squares_kernel<kTaps>, how, arguments);
    visit_storage(arguments.matrices.dtype, [&](auto tag) {
      launch(interpolate_kernel<typename decltype(tag)::type, kTaps>, how, arguments);
    });
  });
}

}  // namespace freemerge::cuda
