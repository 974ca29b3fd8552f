#include <algorithm>
#include <cmath>

#include "common/error.h"
#include "cuda/butterfly.cuh"
#include "cuda/column_filter.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/mask_gain.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 512;  // at most
constexpr int kMaxPasses = 16;
constexpr int kMaxColumns = 8;                                // of a block: 64 bytes of a row
constexpr int kMinColumns = 4;                                // a sector of 32 bytes
constexpr std::size_t kSharedTarget = std::size_t{72} << 10;  // lets three blocks share a multiprocessor

struct Job {
  ColumnFilter filter;
  int passes;
  int radix[kMaxPasses];
  int columns_log2;  // of a block
  int padding_log2;
};

// Decimation in frequency, in place: after the passes, position p1 M1 + p2 M2 + ... (M1 = n / r1, M2 = M1 /
// r2, ...) holds frequency p1 + r1 (p2 + r2 (p3 + ...)). The inverse undoes the passes one by one, so nothing
// is ever reordered. It runs on numbers with real and imaginary parts swapped, for which it is a forward
// transform.
struct Columns {
  float2* data;
  int columns_log2;
  int padding_log2;

  // Where the last radix is 16, one position in sixteen is skipped, which keeps its blocks in different
  // banks. All other strides are multiples of 16 then, so offsets remain equally spaced.
  __device__ int offset(int position) const {
    return (position + (position >> padding_log2)) << columns_log2;
  }

  __device__ float2& at(int position, int column) const { return data[offset(position) + column]; }
};

struct Butterfly {
  int column;
  int block;   // of M * R positions
  int within;  // 0 .. M - 1
};

// Calls visit(butterfly) for each butterfly of a pass; consecutive threads take neighbouring columns.
template <typename Visit>
__device__ void for_each_butterfly(int count, int columns_log2, int stride, Visit visit) {
  for (int i = static_cast<int>(threadIdx.x); i < count << columns_log2; i += static_cast<int>(blockDim.x)) {
    const unsigned number = static_cast<unsigned>(i) >> columns_log2;
    const unsigned block = number / static_cast<unsigned>(stride);
    visit(Butterfly{i & ((1 << columns_log2) - 1), static_cast<int>(block),
                    static_cast<int>(number - block * static_cast<unsigned>(stride))});
  }
}

// A pass over blocks of `stride` * R positions.
template <int R, bool kInverse>
__device__ void pass(const Columns& columns, const float2* roots, int height, int stride) {
  const int step = columns.offset(stride);
  const int turns = height / (stride * R);
  for_each_butterfly(height / R, columns.columns_log2, stride, [&](Butterfly b) {
    float2* first = &columns.at(b.block * stride * R + b.within, b.column);
    const int turn = turns * b.within;
    float2 x[R];
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = first[q * step];
    if (kInverse) {
#pragma unroll
      for (int q = 1; q < R; ++q) x[q] = multiply(x[q], load(roots + turn * q));
    }
    dft(x);
    if (!kInverse) {
#pragma unroll
      for (int p = 1; p < R; ++p) x[p] = multiply(x[p], load(roots + turn * p));
    }
#pragma unroll
    for (int p = 0; p < R; ++p) first[p * step] = x[p];
  });
  __syncthreads();
}

template <bool kInverse>
__device__ void pass_of_radix(int radix, const Columns& columns, const float2* roots, int height,
                              int stride) {
  if (radix == 16) return pass<16, kInverse>(columns, roots, height, stride);
  if (radix == 4) return pass<4, kInverse>(columns, roots, height, stride);
  if (radix == 2) return pass<2, kInverse>(columns, roots, height, stride);
  if (radix == 3) return pass<3, kInverse>(columns, roots, height, stride);
  if (radix == 5) return pass<5, kInverse>(columns, roots, height, stride);
  pass<7, kInverse>(columns, roots, height, stride);
}

// The frequency of the first position of a block of the last pass.
__device__ int first_frequency(const Job& job, int block) {
  int frequency = 0;
  for (int i = job.passes - 2; i >= 0; --i) {
    const int above = block / job.radix[i];
    frequency = (block - above * job.radix[i]) + job.radix[i] * frequency;
    block = above;
  }
  return frequency;
}

// Any other mask, on columns that hold frequencies; real and imaginary parts are swapped.
__device__ void mask_columns(const Job& job, const Columns& columns, int radix, std::int64_t first_column) {
  const ColumnFilter& a = job.filter;
  const int height = static_cast<int>(a.spectra.height);
  const int blocks = height / radix;
  for_each_butterfly(height, columns.columns_log2, radix, [&](Butterfly b) {
    const std::int64_t bin = first_column + b.column;
    if (bin > a.spectra.width / 2) return;
    const int frequency = first_frequency(job, b.block) + blocks * b.within;
    const auto gain = static_cast<float>(a.factor * mask_gain(a.mask, frequency, bin));
    float2& value = columns.at(b.block * radix + b.within, b.column);
    value = make_float2(value.y * gain, value.x * gain);
  });
  __syncthreads();
}

__device__ float step_gain(const ColumnFilter& a, int2 rows, int frequency) {
  const int height = static_cast<int>(a.spectra.height);
  const int row = frequency <= height / 2 ? frequency : height - frequency;
  return row < rows.x ? a.step_gains[0] : (row < rows.y ? a.step_gains[1] : a.step_gains[2]);
}

// The last forward pass, a mask of steps and the first inverse pass, on the same registers.
template <int R>
__device__ void masked_pass(const Job& job, const Columns& columns, std::int64_t first_column) {
  const ColumnFilter& a = job.filter;
  const int height = static_cast<int>(a.spectra.height);
  const int step = columns.offset(1);
  for_each_butterfly(height / R, columns.columns_log2, 1, [&](Butterfly b) {
    const std::int64_t bin = first_column + b.column;
    const int2 rows = bin <= a.spectra.width / 2 ? load(a.tables.steps + bin) : make_int2(0, 0);
    float2* first = &columns.at(b.block * R, b.column);
    float2 x[R];
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = first[q * step];
    dft(x);
    const int frequency = first_frequency(job, b.block);
#pragma unroll
    for (int p = 0; p < R; ++p) {
      const float gain = step_gain(a, rows, frequency + height / R * p);
      x[p] = make_float2(x[p].y * gain, x[p].x * gain);
    }
    dft(x);
#pragma unroll
    for (int q = 0; q < R; ++q) first[q * step] = x[q];
  });
  __syncthreads();
}

template <int R>
__device__ void masked_passes(const Job& job, const Columns& columns, std::int64_t first_column) {
  const ColumnFilter& a = job.filter;
  if (a.tables.steps) return masked_pass<R>(job, columns, first_column);
  const int height = static_cast<int>(a.spectra.height);
  pass<R, false>(columns, a.tables.roots, height, 1);
  mask_columns(job, columns, R, first_column);
  pass<R, true>(columns, a.tables.roots, height, 1);
}

__device__ void masked_passes_of_radix(const Job& job, const Columns& columns, std::int64_t first_column) {
  const int radix = job.radix[job.passes - 1];
  if (radix == 16) return masked_passes<16>(job, columns, first_column);
  if (radix == 4) return masked_passes<4>(job, columns, first_column);
  if (radix == 2) return masked_passes<2>(job, columns, first_column);
  if (radix == 3) return masked_passes<3>(job, columns, first_column);
  if (radix == 5) return masked_passes<5>(job, columns, first_column);
  if (radix == 7) return masked_passes<7>(job, columns, first_column);
  masked_passes<1>(job, columns, first_column);
}

__global__ void __launch_bounds__(kThreads) column_filter_kernel(Job job) {
  const ColumnFilter& a = job.filter;
  const int height = static_cast<int>(a.spectra.height);
  const int count = 1 << job.columns_log2;
  const std::int64_t bins = a.spectra.width / 2 + 1;
  const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.x) * count;
  float2* spectrum =
      a.spectra.data + static_cast<std::int64_t>(blockIdx.y) * a.spectra.height * a.spectra.pitch;
  const Columns columns{shared_memory<float2>(), job.columns_log2, job.padding_log2};

  bool constant = true;
  for (int c = 0; c < count; ++c) {
    const std::int64_t bin = first_column + c;
    if (bin < bins) constant = constant && !std::isnan(load(a.tables.gains + bin));
  }
  const int column = static_cast<int>(threadIdx.x) & (count - 1);
  const std::int64_t bin = first_column + column;
  const int row_begin = static_cast<int>(threadIdx.x) >> job.columns_log2;
  const int row_step = static_cast<int>(blockDim.x) >> job.columns_log2;
  if (constant) {  // the columns' own transforms would cancel, but for their factor H
    if (bin >= bins) return;
    const float gain = static_cast<float>(a.factor * height) * load(a.tables.gains + bin);
#pragma unroll 4
    for (int row = row_begin; row < height; row += row_step) {
      float2* value = spectrum + row * a.spectra.pitch + bin;
      const float2 old = load(value);
      store(value, make_float2(old.x * gain, old.y * gain));
    }
    return;
  }
#pragma unroll 8
  for (int row = row_begin; row < height; row += row_step)
    columns.at(row, column) =
        bin < bins ? load(spectrum + row * a.spectra.pitch + bin) : make_float2(0.0f, 0.0f);
  __syncthreads();
  int stride = height;
  for (int i = 0; i + 1 < job.passes; ++i) {
    stride /= job.radix[i];
    pass_of_radix<false>(job.radix[i], columns, a.tables.roots, height, stride);
  }
  masked_passes_of_radix(job, columns, first_column);
  for (int i = job.passes - 2; i >= 0; --i) {
    pass_of_radix<true>(job.radix[i], columns, a.tables.roots, height, stride);
    stride *= job.radix[i];
  }
  if (bin >= bins) return;
#pragma unroll 8
  for (int row = row_begin; row < height; row += row_step) {
    const float2 swapped = columns.at(row, column);
    store(spectrum + row * a.spectra.pitch + bin, make_float2(swapped.y, swapped.x));
  }
}

constexpr int kMaskThreads = 256;

__global__ void __launch_bounds__(kMaskThreads, 2) column_mask_kernel(ColumnFilter a) {
  const std::int64_t bin = static_cast<std::int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (bin > a.spectra.width / 2) return;
  for (std::int64_t row = blockIdx.y; row < a.spectra.height; row += gridDim.y) {
    const auto gain = static_cast<float>(a.factor * mask_gain(a.mask, row, bin));
    for (int i = 0; i < a.spectra.count; ++i) {
      float2* value = a.spectra.data + (i * a.spectra.height + row) * a.spectra.pitch + bin;
      const float2 old = load(value);
      store(value, make_float2(old.x * gain, old.y * gain));
    }
  }
}

std::size_t shared_bytes(std::int64_t height, int columns) {
  return static_cast<std::size_t>((height + height / 16 + 1) * columns) * sizeof(float2);
}

std::size_t most_shared() {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<std::size_t>(bytes);
}

// Neighbouring columns of a block, as a power of two.
int columns_log2(std::int64_t height, std::int64_t bins) {
  int log2 = 0;
  while ((1 << log2) < kMaxColumns && (1 << log2) < bins &&
         ((2 << log2) <= kMinColumns || shared_bytes(height, 2 << log2) <= kSharedTarget))
    ++log2;
  return log2;
}

// Large radices last: the last one also masks. False if a factor remains.
bool factor(std::int64_t height, Job* job) {
  job->passes = 0;
  for (const int radix : {16, 4, 2, 7, 5, 3}) {
    for (; height % radix == 0 && height > 1 && job->passes < kMaxPasses; height /= radix)
      job->radix[job->passes++] = radix;
  }
  if (job->passes == 0) job->radix[job->passes++] = 1;
  std::reverse(job->radix, job->radix + job->passes);
  return height == 1;
}

}  // namespace

std::int64_t longest_column() {
  const std::size_t bytes = most_shared();
  auto height = static_cast<std::int64_t>(bytes / shared_bytes(0, kMinColumns));
  while (shared_bytes(height, kMinColumns) > bytes) --height;
  return height;
}

void column_filter(const ColumnFilter& arguments, cudaStream_t stream) {
  const Spectra& spectra = arguments.spectra;
  Job job{arguments, 0, {}, columns_log2(spectra.height, spectra.width / 2 + 1), 31};
  require(factor(spectra.height, &job), "the fused columns need a length without prime factors beyond 7");
  if (job.radix[job.passes - 1] == 16) job.padding_log2 = 4;
  const int columns = 1 << job.columns_log2;
  const dim3 grid(static_cast<unsigned>(ceil_div(spectra.width / 2 + 1, columns)),
                  static_cast<unsigned>(spectra.count));
  const std::size_t shared = shared_bytes(spectra.height, columns);
  // A block that has a multiprocessor to itself needs more threads to fill it.
  const int threads = shared > kSharedTarget ? kThreads : kThreads / 2;
  launch(column_filter_kernel,
         Launch("column_filter", grid, dim3(static_cast<unsigned>(threads)), shared, stream), job);
}

void column_mask(const ColumnFilter& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.spectra.width / 2 + 1, kMaskThreads)),
                  static_cast<unsigned>(std::min<std::int64_t>(arguments.spectra.height, 65535)));
  launch(column_mask_kernel, Launch("column_mask", grid, dim3(kMaskThreads), 0, stream), arguments);
}

}  // namespace freemerge::cuda
