#include <algorithm>
#include <cmath>

#include "common/error.h"
#include "cuda/chirp_transform.cuh"
#include "cuda/column_filter.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"
#include "cuda/shared_fft.cuh"
#include "cuda/spectrum_column.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kWholeThreads = 512;                            // of blocks with whole columns, at most
constexpr int kMaxColumns = 8;                                // of a block: 64 bytes of a row
constexpr int kMinColumns = 4;                                // a sector of 32 bytes
constexpr std::size_t kSharedTarget = std::size_t{72} << 10;  // lets three blocks share a multiprocessor

struct Job {
  ColumnFilter filter;
  int length;  // of a part
  Passes passes;
  int columns_log2;  // of a block
  int padding_log2;
};

// The frequency of the first position of a block of the last pass, in the transform of a part.
__device__ int first_frequency(const Passes& passes, int block) {
  int frequency = 0;
  for (int i = passes.count - 2; i >= 0; --i) {
    const int above = block / passes.radix[i];
    frequency = (block - above * passes.radix[i]) + passes.radix[i] * frequency;
    block = above;
  }
  return frequency;
}

// The row frequency of the matrix that is a frequency of this block's part.
__device__ int row_frequency(const ColumnFilter& a, int frequency) {
  return static_cast<int>(blockIdx.y) + a.parts * frequency;
}

__device__ float step_gain(const ColumnFilter& a, int2 rows, int frequency) {
  const int height = static_cast<int>(a.spectra.height);
  const int row = frequency <= height / 2 ? frequency : height - frequency;
  return row < rows.x ? a.step_gains[0] : (row < rows.y ? a.step_gains[1] : a.step_gains[2]);
}

// What the columns of a warp add to the squares of the matrix.
__device__ void put_energy(const ColumnFilter& a, double energy) {
  energy = warp_sum(energy);
  const unsigned block = blockIdx.y * gridDim.x + blockIdx.x;
  const unsigned warp = block * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) store(a.energies.sums + warp, energy);
}

// By the table of energies.
__device__ double energy_of(const ColumnFilter& a, int row, int bin, float2 value) {
  const bool first = row == 0 && bin == 0;
  const double taken = first ? a.tables.center_share * static_cast<double>(load(a.energies.center)) : 0.0;
  const double real = static_cast<double>(value.x) + taken;
  const int bins = static_cast<int>(a.spectra.width / 2 + 1);
  return static_cast<double>(load(a.tables.energies + (row * bins + bin))) * (real * real + squared(value.y));
}

// Any mask, on columns that hold frequencies; real and imaginary parts are swapped.
template <Transform kBy>
__device__ double mask_columns(const Job& job, const InterleavedLines& columns, int first_column) {
  const ColumnFilter& a = job.filter;
  const int radix = kBy == Transform::kChirp ? 1 : job.passes.last();
  const bool tells = a.energies.sums && a.tables.energies;
  double energy = 0.0;
  columns.for_each_butterfly(job.length, radix, [&](Butterfly b) {
    const int bin = first_column + b.line;
    if (bin > a.spectra.width / 2) return;
    const int frequency = kBy == Transform::kChirp
                              ? b.block  // in their order
                              : first_frequency(job.passes, b.block) + job.length / radix * b.within;
    const int row = row_frequency(a, frequency);
    const float gain = a.tables.steps ? step_gain(a, load(a.tables.steps + bin), row)
                                      : scaled_gain(a.mask, a.factor, row, bin);
    float2& value = columns.at(b.block * radix + b.within, b.line);
    if (tells) energy += energy_of(a, row, bin, value);
    value = make_float2(value.y * gain, value.x * gain);
  });
  __syncthreads();
  return energy;
}

// The last forward pass, a mask of steps and the first inverse pass, on the same registers.
template <int R>
__device__ void masked_pass(const Job& job, const InterleavedLines& columns, int first_column) {
  const ColumnFilter& a = job.filter;
  const int length = job.passes.length;
  columns.for_each_butterfly(length / R, 1, [&](Butterfly b) {
    const int bin = first_column + b.line;
    const int2 rows = bin <= a.spectra.width / 2 ? load(a.tables.steps + bin) : make_int2(0, 0);
    const auto points = columns.walk(b.block * R, 1, b.line);
    float2 x[R];
#pragma unroll
    for (int q = 0; q < R; ++q) x[q] = points[q];
    dft(x);
    const int frequency = first_frequency(job.passes, b.block);
#pragma unroll
    for (int p = 0; p < R; ++p) {
      const float gain = step_gain(a, rows, row_frequency(a, frequency + length / R * p));
      x[p] = make_float2(x[p].y * gain, x[p].x * gain);
    }
    dft(x);
#pragma unroll
    for (int q = 0; q < R; ++q) points[q] = x[q];
  });
  __syncthreads();
}

__device__ void masked_pass_of_radix(const Job& job, const InterleavedLines& columns, int first_column) {
  const int radix = job.passes.last();
  if (radix == 16) masked_pass<16>(job, columns, first_column);
  if (radix == 8) masked_pass<8>(job, columns, first_column);
  if (radix == 4) masked_pass<4>(job, columns, first_column);
  if (radix == 2) masked_pass<2>(job, columns, first_column);
  if (radix == 3) masked_pass<3>(job, columns, first_column);
  if (radix == 5) masked_pass<5>(job, columns, first_column);
  if (radix == 7) masked_pass<7>(job, columns, first_column);
  if (radix == 1) masked_pass<1>(job, columns, first_column);
}

constexpr int most_threads(Transform by) { return by == Transform::kCommon ? kWholeThreads : kColumnThreads; }

constexpr int least_blocks(Transform by) {
  return by == Transform::kCommon ? 1 : (by == Transform::kChirp ? 3 : 2);
}

// Columns of frequencies in shared memory, their mask, and back, with real and imaginary parts swapped.
template <Transform kBy>
__device__ double filter_columns(const Job& job, const InterleavedLines& columns, int first_column) {
  constexpr bool kUncommon = kBy == Transform::kUncommon;
  const ColumnTables& tables = job.filter.tables;
  const Passes& passes = job.passes;
  double energy = 0.0;
  if constexpr (kBy == Transform::kChirp) {
#pragma unroll 1
    for (int way = 0; way < 2; ++way) {
      transform_by_chirp(columns, passes, tables.roots, tables.chirp);
      if (way == 0) energy = mask_columns<kBy>(job, columns, first_column);
    }
    return energy;
  }
  // A pass whose results are masked while they are in registers, or that has no turns, is the same both ways.
  const bool fused = !kUncommon && tables.steps;
  const bool direct = kUncommon && passes.last() == 43;
  const int ordinary = passes.count - (fused || direct ? 1 : 0);
  int stride = passes.length;
  for (int i = 0; i < ordinary; ++i) {
    stride /= passes.radix[i];
    pass_of_radix<kUncommon, false>(passes.radix[i], columns, tables.roots, passes.length, stride);
  }
  if constexpr (!kUncommon) {
    if (fused) masked_pass_of_radix(job, columns, first_column);
  }
#pragma unroll 1
  for (int way = 0; way < 2 && !fused; ++way) {
    if constexpr (kUncommon) {
      if (direct) pass<43, false>(columns, tables.roots, passes.length, 1);
    }
    if (way == 0) energy = mask_columns<kBy>(job, columns, first_column);
  }
  for (int i = ordinary - 1; i >= 0; --i) {
    pass_of_radix<kUncommon, true>(passes.radix[i], columns, tables.roots, passes.length, stride);
    stride *= passes.radix[i];
  }
  return energy;
}

// By what a thread is about to write; columns beyond the last hold zeros.
__device__ double energy_of_columns(const Job& job, const InterleavedLines& columns, int bin) {
  const ColumnFilter& a = job.filter;
  const int column = static_cast<int>(threadIdx.x) & ((1 << job.columns_log2) - 1);
  double squares = 0.0;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) >> job.columns_log2; row < job.length;
       row += static_cast<int>(blockDim.x) >> job.columns_log2) {
    const float2 value = columns.at(row, column);
    squares += squared(value.x) + squared(value.y);
  }
  const bool alone = bin == 0 || 2 * bin == a.spectra.width;  // else its mirror has as much
  return squares * (alone ? a.energy_share : 2.0 * a.energy_share);
}

// blockIdx: columns, part, matrix.
template <Transform kBy>
__global__ void __launch_bounds__(most_threads(kBy), least_blocks(kBy)) column_filter_kernel(Job job) {
  const ColumnFilter& a = job.filter;
  const int count = 1 << job.columns_log2;
  const int bins = static_cast<int>(a.spectra.width / 2 + 1);
  const int first_column = static_cast<int>(blockIdx.x) * count;
  const std::int64_t first_row = static_cast<std::int64_t>(blockIdx.y) * job.length;
  const InterleavedLines columns{shared_memory<float2>(), job.columns_log2, job.padding_log2};

  // The columns' own transforms would cancel, but for a factor, where gains are constant.
  const auto constant_factor = static_cast<float>(a.factor * job.length);
  bool constant = true;
  bool unchanged = true;
  for (int c = 0; c < count; ++c) {
    const int bin = first_column + c;
    if (bin >= bins) continue;
    const float gain = load(a.tables.gains + bin);
    constant = constant && !std::isnan(gain);
    unchanged = unchanged && constant_factor * gain == 1.0f;
  }
  if (unchanged) return;
  const int column = static_cast<int>(threadIdx.x) & (count - 1);
  const int bin = first_column + column;
  const SpectrumColumn spectrum(a.spectra, static_cast<int>(blockIdx.z), bin < bins ? bin : 0);
  const int row_begin = static_cast<int>(threadIdx.x) >> job.columns_log2;
  const int row_step = static_cast<int>(blockDim.x) >> job.columns_log2;
  if (constant) {
    if (bin >= bins) return;
    const float gain = constant_factor * load(a.tables.gains + bin);
#pragma unroll 4
    for (int row = row_begin; row < job.length; row += row_step) {
      const float2 old = spectrum.get(first_row + row);
      spectrum.put(first_row + row, make_float2(old.x * gain, old.y * gain));
    }
    return;
  }
#pragma unroll 8
  for (int row = row_begin; row < job.length; row += row_step)
    columns.at(row, column) = bin < bins ? spectrum.get(first_row + row) : make_float2(0.0f, 0.0f);
  __syncthreads();
  double energy = filter_columns<kBy>(job, columns, first_column);
  if (a.energies.sums) {
    if (!a.tables.energies) energy = energy_of_columns(job, columns, bin);
    put_energy(a, energy);
  }
  if (bin >= bins) return;
#pragma unroll 8
  for (int row = row_begin; row < job.length; row += row_step) {
    spectrum.put(first_row + row, swapped(columns.at(row, column)));
  }
}

constexpr int kMaskThreads = 256;

__global__ void __launch_bounds__(kMaskThreads, 2) column_mask_kernel(ColumnFilter a) {
  const std::int64_t bin = static_cast<std::int64_t>(blockIdx.x) * kMaskThreads + threadIdx.x;
  if (bin > a.spectra.width / 2) return;
  for (std::int64_t row = blockIdx.y; row < a.spectra.height; row += gridDim.y) {
    const auto gain = scaled_gain(a.mask, a.factor, row, bin);
    for (int i = 0; i < a.spectra.count; ++i) {
      const SpectrumColumn spectrum(a.spectra, i, bin);
      const float2 old = spectrum.get(row);
      spectrum.put(row, make_float2(old.x * gain, old.y * gain));
    }
  }
}

// Neighbouring columns of a block, as a power of two.
int columns_log2(std::int64_t height, std::int64_t bins) {
  int log2 = 0;
  while ((1 << log2) < kMaxColumns && (1 << log2) < bins &&
         ((2 << log2) <= kMinColumns || column_bytes(height, 2 << log2) <= kSharedTarget))
    ++log2;
  return log2;
}

}  // namespace

std::size_t column_bytes(std::int64_t length, int columns) {
  return static_cast<std::size_t>((length + length / 16 + 1) * columns) * sizeof(float2);
}

std::size_t block_bytes() {
  int device = 0;
  int bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<std::size_t>(bytes);
}

std::int64_t longest_column() {
  const std::size_t bytes = block_bytes();
  auto height = static_cast<std::int64_t>(bytes / column_bytes(0, kMinColumns));
  while (column_bytes(height, kMinColumns) > bytes) --height;
  return height;
}

void column_filter(const ColumnFilter& arguments, const ColumnBlocks& blocks, cudaStream_t stream) {
  const Passes& passes = blocks.line.passes;
  const Job job{arguments, blocks.length, passes, blocks.columns_log2, passes.last() == 16 ? 4 : 31};
  const HalfSpectra& spectra = arguments.spectra;
  const int columns = 1 << blocks.columns_log2;
  const dim3 grid(static_cast<unsigned>(ceil_div(spectra.width / 2 + 1, columns)),
                  static_cast<unsigned>(arguments.parts), static_cast<unsigned>(spectra.count));
  const Transform by = blocks.line.transform;
  require(blocks.threads <= most_threads(by), "a block of columns has too many threads");
  launch(by == Transform::kCommon     ? column_filter_kernel<Transform::kCommon>
         : by == Transform::kUncommon ? column_filter_kernel<Transform::kUncommon>
                                      : column_filter_kernel<Transform::kChirp>,
         Launch("column_filter", grid, dim3(static_cast<unsigned>(blocks.threads)),
                column_bytes(blocks.line.passes.length, columns), stream),
         job);
}

std::int64_t column_warps(std::int64_t bins, int parts, const ColumnBlocks& blocks) {
  return ceil_div(bins, 1 << blocks.columns_log2) * parts * (blocks.threads / kWarpSize);
}

ColumnBlocks whole_columns(std::int64_t height, std::int64_t bins) {
  const int log2 = columns_log2(height, bins);
  // A block that has a multiprocessor to itself needs more threads to fill it.
  const int threads = column_bytes(height, 1 << log2) > kSharedTarget ? kWholeThreads : kWholeThreads / 2;
  return {
      static_cast<int>(height), {passes_of(height, {16, 4, 2, 7, 5, 3}), Transform::kCommon}, log2, threads};
}

ColumnBlocks column_blocks(std::int64_t height, const Tiles& tiles) {
  require(tiles.parts > 0 && height % tiles.parts == 0, "parts must divide the height");
  int log2 = 0;
  while (1 << log2 < tiles.columns) ++log2;
  require(1 << log2 == tiles.columns, "the columns of a block must be a power of two");
  const std::int64_t length = height / tiles.parts;
  return {static_cast<int>(length), line_passes(length, tiles.column_chirp), log2, tiles.column_threads};
}

void column_mask(const ColumnFilter& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.spectra.width / 2 + 1, kMaskThreads)),
                  static_cast<unsigned>(std::min<std::int64_t>(arguments.spectra.height, 65535)));
  launch(column_mask_kernel, Launch("column_mask", grid, dim3(kMaskThreads), 0, stream), arguments);
}

}  // namespace freemerge::cuda
