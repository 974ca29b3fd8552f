#include <type_traits>

#include "cuda/add_last.cuh"
#include "cuda/interpolate.cuh"
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

// Coarse columns that a thread's columns touch, at most: one more than a window where they lie in two cells,
// else as if each lay in a cell of its own, so that the number is odd. A whole axis has no windows.
constexpr int kLeastTouched = kernel_taps(1) + 1;
constexpr int kMostTouched = kMaxTaps + kColumnsPerThread - 1;

FM_HOST_DEVICE inline int touched_columns(const WindowTables& columns) {
  constexpr int kSteps = kColumnsPerThread - 1;
  if (columns.whole()) return 0;
  return kernel_taps(columns.taps) + (kSteps * columns.cells <= columns.samples ? 1 : kSteps);
}

// The coarse rows in a thread's columns, interpolated along the columns axis where they are asked for. The
// walk down the rows leaves no registers for the weights: they are in shared memory, weights[j][thread],
// those of a thread's columns for the j-th coarse column that it touches. No thread reads another's.
class CoarseRows {
 public:
  __device__ CoarseRows(const Interpolate& a, std::int64_t column)
      : pitch_(static_cast<std::uint32_t>(a.grids.pitch)),
        row_count_(static_cast<int>(a.grids.rows)),
        column_count_(static_cast<int>(a.grids.columns)),
        touched_(touched_columns(a.columns)),
        first_(static_cast<int>(column)),
        weights_(shared_memory<Quad<float>>() + threadIdx.x) {
    if (touched_ > 0) {
      first_ = load(a.columns.cell + column);
      find_weights(a.columns, static_cast<int>(column));
    }
    grid_ = a.grids.data + blockIdx.z * a.grids.step + first_;
  }

  // Row `cell` of the grid, which wraps around its end, as it does along the columns.
  __device__ Quad<float> operator()(int cell) const {
    const auto row = static_cast<std::uint32_t>(wrap_ahead(cell, row_count_));
    const float* line = grid_ + std::uint64_t{row} * pitch_;
    if (touched_ == 0) return load(reinterpret_cast<const Quad<float>*>(line));
    Quad<float> sums{};
    const auto add = [&](int j, float value) {
      const Quad<float> weights = weights_[j * kRowPassThreads];
#pragma unroll
      for (int c = 0; c < kColumnsPerThread; ++c) sums.entries[c] += weights.entries[c] * value;
    };
    if (first_ + touched_ <= column_count_) {
      for_each_touched([&](int j) { add(j, load(line + j)); });
    } else {
#pragma unroll 1
      for (int j = 0; j < touched_; ++j)
        add(j, load(line + (wrap_ahead(first_ + j, column_count_) - first_)));
    }
    return sums;
  }

 private:
  // Unrolled; as the number is odd, it need not be looked at each time.
  template <typename Visit>
  __device__ void for_each_touched(Visit visit) const {
#pragma unroll
    for (int j = 0; j < kMostTouched; ++j) {
      if (j >= kLeastTouched && j % 2 == 1 && j >= touched_) break;
      visit(j);
    }
  }

  __device__ void find_weights(const WindowTables& window, int column) {
    for_each_touched([&](int j) { weights_[j * kRowPassThreads] = {}; });
#pragma unroll
    for (int c = 0; c < kColumnsPerThread; ++c) {
      if (column + c >= window.samples) break;
      Quad<float>* own = weights_ + (load(window.cell + column + c) - first_) * kRowPassThreads;
      const float* source = window.weights + std::int64_t{column + c} * padded_taps(window.taps);
#pragma unroll
      for (int j = 0; j < kMaxTaps; j += 2) {
        if (j >= kernel_taps(1) && j >= window.taps) break;
        const float2 two = load(reinterpret_cast<const float2*>(source + j));
        own[j * kRowPassThreads].entries[c] = two.x;
        own[(j + 1) * kRowPassThreads].entries[c] = two.y;
      }
    }
  }

  const float* grid_;  // from column `first_` on
  std::uint32_t pitch_;
  int row_count_;
  int column_count_;
  int touched_;
  int first_;  // of the touched columns; of a whole axis, the thread's own
  Quad<float>* weights_;
};

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
      : job(a.add), width(a.columns.samples), column(column_) {}

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
      sums.entries[c] = added(job, base[i].entries[c], values.entries[c]);
    visit_entries(job.out, [&](auto* entries) { store_quad(entries + first + i * width, kTogether, sums); });
  }
};

// A thread's columns of a chunk of rows.
template <typename T, int kTaps, typename Write>
__device__ void interpolate_columns(const Interpolate& a, std::int64_t column, int chunk, Write& result) {
  constexpr int kAhead = Write::kAhead;
  const WindowTables& window = a.rows;
  const std::int64_t row_stride = a.matrices.row_stride[blockIdx.z];
  T* matrix = static_cast<T*>(a.matrices.data[blockIdx.z]);
  const QuadAccess access = quad_access(matrix, row_stride, column, a.columns.samples);
  // A gain of zero must not turn an infinity that is about to be overwritten into NaN.
  const QuadAccess read = a.gain != 0.0f ? access : QuadAccess{false, 0};
  const int begin = chunk_begin(a.chunks, chunk);
  const int end = chunk_end(a.chunks, chunk, window);
  matrix += column;
  const float constant = a.center_gain * load(a.centers + blockIdx.z);

  const CoarseRows coarse_row(a, column);
  // The last cell first: what `spread_rows` read last is still in L2. The cells above it, without rows of
  // this chunk, bring the first coarse rows.
  const int last_cell = load(window.cell + end - 1);
  Quad<float> coarse[kTaps] = {};  // rows cell .. cell + kTaps - 1
  int cell_end = end;
#pragma unroll 1
  for (int cell = last_cell + kTaps - 1; cell_end > begin; --cell) {
#pragma unroll
    for (int j = kTaps - 1; j > 0; --j) coarse[j] = coarse[j - 1];
    coarse[0] = coarse_row(cell);
    if (cell > last_cell) continue;
    const auto first_row = static_cast<int>(load(window.first + cell));
    const int cell_begin = first_row > begin ? first_row : begin;
    T* entries = matrix + cell_begin * row_stride;
#pragma unroll 1
    for (int row = cell_begin; row < cell_end; row += kAhead) {
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
        result.write(entries, access, i, values);
        entries += row_stride;
      }
    }
    cell_end = cell_begin;
  }
}

// The last chunk first, too.
__device__ inline int reversed_chunk() { return static_cast<int>(gridDim.y - 1 - blockIdx.y); }

template <typename T, int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kRowPassBlocks<kTaps>) interpolate_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  WriteBack result;
  if (column < a.columns.samples) interpolate_columns<T, kTaps>(a, column, reversed_chunk(), result);
}

template <int kTaps>
__global__ void __launch_bounds__(kRowPassThreads, kSumPassBlocks) interpolate_added_kernel(Interpolate a) {
  const std::int64_t column = first_column<kColumnsPerThread>();
  WriteAdded result(a, column);
  if (column < a.columns.samples) interpolate_columns<float, kTaps>(a, column, reversed_chunk(), result);
}

}  // namespace

void interpolate(const Interpolate& arguments, cudaStream_t stream) {
  const WindowTables& columns = arguments.columns;
  const std::size_t weights = touched_columns(columns) * kRowPassThreads * sizeof(Quad<float>);
  const dim3 grid = row_pass_grid(columns.samples, arguments.chunks.end, arguments.matrices.count);
  const Launch how("interpolate", grid, dim3(kRowPassThreads), weights, stream);
  visit_taps(arguments.rows.taps, [&](auto taps) {
    constexpr int kTaps = decltype(taps)::value;
    if (arguments.add.out.data) return launch(interpolate_added_kernel<kTaps>, how, arguments);
    visit_storage(arguments.matrices.dtype, [&](auto tag) {
      launch(interpolate_kernel<typename decltype(tag)::type, kTaps>, how, arguments);
    });
  });
}

}  // namespace freemerge::cuda
