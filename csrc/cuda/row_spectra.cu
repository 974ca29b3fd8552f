#include <type_traits>

#include "common/error.h"
#include "cuda/add_last.cuh"
#include "cuda/chirp_transform.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"
#include "cuda/row_spectra.cuh"
#include "cuda/shared_fft.cuh"
#include "cuda/spectrum_column.cuh"
#include "cuda/storage.cuh"
#include "cuda/weighted_sum.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kBatch = 4;  // pairs of entries of a thread that are on their way from memory together

// The rows of a block. Without parts to combine, two neighbours share a line; the last one may be missing.
struct RowGroup {
  std::int64_t first;
  std::int64_t step;
  std::int64_t height;
  int slots;

  __device__ explicit RowGroup(const RowPass& a)
      : first(static_cast<std::int64_t>(blockIdx.x) * (a.parts == 1 ? 2 : 1)),
        step(a.parts == 1 ? 1 : a.spectra.height / a.parts),
        height(a.spectra.height),
        slots(a.parts == 1 ? 2 : a.parts) {}

  __device__ std::int64_t row(int slot) const { return first + slot * step; }
  __device__ bool has(int slot) const { return row(slot) < height; }
};

FM_HOST_DEVICE int line_count(int parts) { return parts <= 2 ? 1 : parts / 2; }
FM_HOST_DEVICE int line_pitch(int points) { return padded(points - 1) + 1; }

__device__ ConsecutiveLines lines_of(const RowPass& a) {
  return {shared_memory<float2>(), line_count(a.parts), line_pitch(a.tables.line.passes.length)};
}

__device__ int width_of(const RowPass& a) { return static_cast<int>(a.spectra.width); }

// The rows of slots 2 j and 2 j + 1 become the real and imaginary parts of line j.
template <typename T>
__device__ void read_rows(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  const std::int64_t stride = a.matrices.row_stride[blockIdx.y];
  const T* matrix = static_cast<const T*>(a.matrices.data[blockIdx.y]);
  const int width = width_of(a);
  const int threads = static_cast<int>(blockDim.x);
  for (int j = 0; j < lines.lines; ++j) {
    const T* upper = matrix + group.row(2 * j) * stride;
    const bool has_lower = group.has(2 * j + 1);
    const T* lower = has_lower ? matrix + group.row(2 * j + 1) * stride : upper;
    for (int begin = 2 * static_cast<int>(threadIdx.x); begin < width; begin += 2 * threads * kBatch) {
      Pair<T> pairs[kBatch][2] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = begin + 2 * threads * i;
        if (column >= width) break;
        const PairAccess access = pair_access(matrix, stride, column, width);
        pairs[i][0] = load_pair(upper + column, access);
        if (has_lower) pairs[i][1] = load_pair(lower + column, access);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = begin + 2 * threads * i;
        if (column >= width) break;
        const float2 real = widen(pairs[i][0]);
        const float2 imaginary = widen(pairs[i][1]);
        lines.at(column, j) = make_float2(real.x, imaginary.x);
        if (column + 1 < width) lines.at(column + 1, j) = make_float2(real.y, imaginary.y);
      }
    }
  }
}

// Of the sums of each warp of all blocks, those of kind i.
__device__ void store_of_warp(const RowPass& a, int i, double sum) {
  const std::int64_t warps = blockDim.x / kWarpSize;
  const std::int64_t blocks = gridDim.x;
  store(a.sums + (i * blocks + blockIdx.x) * warps + threadIdx.x / kWarpSize, sum);
}

// What read_rows() does, of rows that are added up here, eight columns a lane. Lane m keeps the magnitudes of
// model m.
__device__ void add_rows(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  const int width = width_of(a);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double kept = 0.0;
  double squares = 0.0;
#pragma unroll 1
  for (int slot = 0; slot < group.slots; ++slot) {
    const std::int64_t row = group.row(slot) * width;
    // All lanes of a warp stay as long as one of them has columns.
    for (int begin = static_cast<int>(threadIdx.x) - lane; begin * kEntries < width;
         begin += static_cast<int>(blockDim.x)) {
      const int column = (begin + lane) * kEntries;
      float sum[kEntries] = {};
      if (group.has(slot)) {
        add_weighted(a.vectors, row + column, row + width, true, sum, [&](int m, double magnitudes) {
          magnitudes = warp_sum(magnitudes);
          if (lane == m) kept += magnitudes;
        });
      }
#pragma unroll
      for (int e = 0; e < kEntries; ++e) {
        if (column + e >= width) break;
        squares += squared(sum[e]);
        float2& point = lines.at(column + e, slot / 2);
        (slot % 2 == 0 ? point.x : point.y) = sum[e];
      }
    }
  }
  squares = warp_sum(squares);
  if (lane == a.vectors.count) kept = squares;
  if (lane <= a.vectors.count) store_of_warp(a, lane, kept);
}

// The way back: lines hold swapped numbers, in the order that the passes leave.
template <typename T>
__device__ void write_rows(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  const std::int64_t stride = a.matrices.row_stride[blockIdx.y];
  T* matrix = static_cast<T*>(a.matrices.data[blockIdx.y]);
  const int width = width_of(a);
  for (int j = 0; j < lines.lines; ++j) {
    T* upper = matrix + group.row(2 * j) * stride;
    T* lower = matrix + group.row(2 * j + 1) * stride;
    const bool has_lower = group.has(2 * j + 1);
    const float2* line = lines.data + j * lines.pitch;
#pragma unroll 4
    for (int column = 2 * static_cast<int>(threadIdx.x); column < width;
         column += 2 * static_cast<int>(blockDim.x)) {
      const PairAccess access = pair_access(matrix, stride, column, width);
      const float2 first = line[load(a.tables.offsets + column)];
      const float2 second = line[load(a.tables.offsets + (access.second ? column + 1 : column))];
      store_pair(upper + column, access, make_float2(a.factor * first.y, a.factor * second.y));
      if (has_lower) store_pair(lower + column, access, make_float2(a.factor * first.x, a.factor * second.x));
    }
  }
}

// Puts down what bins that stay as they are, or are only multiplied, add to the squares of what is left of a
// sum. A line has both of its rows, and mirrored bins. A loop of its own: in write_bins() it would be there
// four times.
__device__ void put_kept(const RowPass& a, const ConsecutiveLines& lines) {
  const int width = width_of(a);
  double sum = 0.0;
#pragma unroll 1
  for (int j = 0; j < lines.lines; ++j) {
#pragma unroll 1
    for (int column = static_cast<int>(threadIdx.x); column < width; column += static_cast<int>(blockDim.x)) {
      const float2 point = lines.data[j * lines.pitch + load(a.tables.offsets + column)];
      const float kept = load(a.tables.kept + (2 * column <= width ? column : width - column));
      sum += static_cast<double>(kept) * (squared(point.x) + squared(point.y));
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) store_of_warp(a, a.vectors.count + 1, sum);
}

// What write_rows() would write, added to a base instead, four columns of two rows a thread.
__device__ void add_rows_to_base(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  const int width = width_of(a);
#pragma unroll 1
  for (int j = 0; j < lines.lines; ++j) {
    const std::int64_t rows[2] = {group.row(2 * j) * width, group.row(2 * j + 1) * width};
    const bool has_lower = group.has(2 * j + 1);
    const float2* line = lines.data + j * lines.pitch;
#pragma unroll 1
    for (int column = kQuad * static_cast<int>(threadIdx.x); column < width;
         column += kQuad * static_cast<int>(blockDim.x)) {
      Quad<float> sums[2];
      visit_entries(a.add.base, [&](auto* entries) {
        using Stored = Quad<std::remove_pointer_t<decltype(entries)>>;
        const Stored upper = load(reinterpret_cast<const Stored*>(entries + rows[0] + column));
        const Stored lower =
            has_lower ? load(reinterpret_cast<const Stored*>(entries + rows[1] + column)) : upper;
#pragma unroll
        for (int c = 0; c < kQuad; ++c) {
          sums[0].entries[c] = widen(upper.entries[c]);
          sums[1].entries[c] = widen(lower.entries[c]);
        }
      });
#pragma unroll
      for (int c = 0; c < kQuad; ++c) {
        const float2 point = line[load(a.tables.offsets + column + c)];
        sums[0].entries[c] = added(a.add, sums[0].entries[c], a.factor * point.y);
        sums[1].entries[c] = added(a.add, sums[1].entries[c], a.factor * point.x);
      }
      visit_entries(a.add.out, [&](auto* entries) {
        using T = std::remove_pointer_t<decltype(entries)>;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (i == 1 && !has_lower) break;
          Quad<T> quad;
#pragma unroll
          for (int c = 0; c < kQuad; ++c) quad.entries[c] = narrow<T>(sums[i].entries[c]);
          store(reinterpret_cast<Quad<T>*>(entries + rows[i] + column), quad);
        }
      });
    }
  }
}

// exp(-2 pi i row p / height): what each row of a group is turned by.
template <int kSlots>
__device__ void load_turns(const RowPass& a, const RowGroup& group, float2 (&turns)[kSlots]) {
#pragma unroll
  for (int p = 1; p < kSlots; ++p) turns[p] = load(a.tables.turns + group.first * p);
}

// From the lines' transforms to those of their rows, and of the group's rows together.
template <int kParts>
__device__ void write_bins(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  constexpr int kSlots = kParts == 1 ? 2 : kParts;
  const int width = width_of(a);
  const int index = static_cast<int>(blockIdx.y);
  float2 turns[kSlots];
  if constexpr (kParts > 1) load_turns(a, group, turns);
  for (int bin = static_cast<int>(threadIdx.x); bin <= width / 2; bin += static_cast<int>(blockDim.x)) {
    const int here = load(a.tables.offsets + bin);
    const int mirror = load(a.tables.offsets + (bin == 0 ? 0 : width - bin));
    float2 x[kSlots];
#pragma unroll
    for (int j = 0; j < kSlots / 2; ++j) {  // line = real + i imaginary row
      const float2 z = lines.data[j * lines.pitch + here];
      const float2 m = lines.data[j * lines.pitch + mirror];
      x[2 * j] = make_float2(z.x + m.x, z.y - m.y);
      x[2 * j + 1] = make_float2(z.y + m.y, m.x - z.x);
    }
    if constexpr (kParts > 1) {
      dft(x);
#pragma unroll
      for (int p = 1; p < kSlots; ++p) x[p] = multiply(x[p], turns[p]);
    }
    const SpectrumColumn spectrum(a.spectra, index, bin);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (kParts > 1 || group.has(s)) spectrum.put(group.row(s), x[s]);
    }
  }
}

// The inverse of write_bins, with real and imaginary parts swapped: undoing a turn is turning a swapped
// number.
template <int kParts>
__device__ void read_bins(const RowPass& a, const RowGroup& group, const ConsecutiveLines& lines) {
  constexpr int kSlots = kParts == 1 ? 2 : kParts;
  const int width = width_of(a);
  const int index = static_cast<int>(blockIdx.y);
  float2 turns[kSlots];
  if constexpr (kParts > 1) load_turns(a, group, turns);
  for (int bin = static_cast<int>(threadIdx.x); bin <= width / 2; bin += static_cast<int>(blockDim.x)) {
    const SpectrumColumn spectrum(a.spectra, index, bin);
    float2 x[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const bool present = kParts > 1 || group.has(s);
      const float2 value = present ? spectrum.get(group.row(s)) : make_float2(0.0f, 0.0f);
      x[s] = make_float2(value.y, value.x);
    }
    if constexpr (kParts > 1) {
#pragma unroll
      for (int p = 1; p < kSlots; ++p) x[p] = multiply(x[p], turns[p]);
      dft(x);
    }
    const bool alone = bin == 0 || 2 * bin == width;  // its own mirror: real
#pragma unroll
    for (int j = 0; j < kSlots / 2; ++j) {
      const float2 real = x[2 * j];
      const float2 imaginary = x[2 * j + 1];
      if (alone) {
        lines.at(bin, j) = make_float2(imaginary.y, real.y);
      } else {
        lines.at(bin, j) = make_float2(real.x + imaginary.y, real.y - imaginary.x);
        lines.at(width - bin, j) = make_float2(imaginary.y - real.x, real.y + imaginary.x);
      }
    }
  }
}

template <Transform kBy>
__device__ void transform_lines(const ConsecutiveLines& lines, const RowTables& tables) {
  if constexpr (kBy == Transform::kChirp) {
    transform_by_chirp(lines, tables.line.passes, tables.roots, tables.chirp);
  } else {
    transform<kBy == Transform::kUncommon>(lines, tables.line.passes, tables.roots);
  }
}

constexpr int most_threads(Transform by) {
  return by == Transform::kUncommon ? kUncommonThreads : kRowThreads;
}

// blockIdx: group of rows, matrix.
template <Transform kBy>
__global__ void __launch_bounds__(most_threads(kBy), 2) rows_to_spectra_kernel(RowPass a) {
  const RowGroup group(a);
  const ConsecutiveLines lines = lines_of(a);
  if (a.vectors.count > 0) {
    add_rows(a, group, lines);
  } else {
    if (a.matrices.dtype == DType::kFloat32) read_rows<float>(a, group, lines);
    if (a.matrices.dtype == DType::kBFloat16) read_rows<__nv_bfloat16>(a, group, lines);
    if (a.matrices.dtype == DType::kFloat16) read_rows<__half>(a, group, lines);
  }
  __syncthreads();
  transform_lines<kBy>(lines, a.tables);
  if (a.vectors.count > 0) put_kept(a, lines);
  if (a.parts == 1) write_bins<1>(a, group, lines);
  if (a.parts == 2) write_bins<2>(a, group, lines);
  if (a.parts == 4) write_bins<4>(a, group, lines);
  if (a.parts == 8) write_bins<8>(a, group, lines);
}

template <Transform kBy>
__global__ void __launch_bounds__(most_threads(kBy), 2) spectra_to_rows_kernel(RowPass a) {
  const RowGroup group(a);
  const ConsecutiveLines lines = lines_of(a);
  if (a.parts == 1) read_bins<1>(a, group, lines);
  if (a.parts == 2) read_bins<2>(a, group, lines);
  if (a.parts == 4) read_bins<4>(a, group, lines);
  if (a.parts == 8) read_bins<8>(a, group, lines);
  __syncthreads();
  transform_lines<kBy>(lines, a.tables);
  if (a.add.out.data) return add_rows_to_base(a, group, lines);
  if (a.matrices.dtype == DType::kFloat32) write_rows<float>(a, group, lines);
  if (a.matrices.dtype == DType::kBFloat16) write_rows<__nv_bfloat16>(a, group, lines);
  if (a.matrices.dtype == DType::kFloat16) write_rows<__half>(a, group, lines);
}

std::int64_t group_count(std::int64_t height, int parts) {
  return parts == 1 ? ceil_div(height, 2) : height / parts;
}

using RowKernel = void (*)(RowPass);

// `instances` are in the order of Transform.
void launch_rows(const char* name, const RowKernel (&instances)[3], const RowPass& a, cudaStream_t stream) {
  const Transform by = a.tables.line.transform;
  require(a.threads <= most_threads(by), "a block of rows has too many threads");
  const dim3 grid(static_cast<unsigned>(group_count(a.spectra.height, a.parts)),
                  static_cast<unsigned>(a.matrices.count));
  launch(instances[static_cast<int>(by)],
         Launch(name, grid, dim3(static_cast<unsigned>(a.threads)),
                row_bytes(a.tables.line.passes.length, a.parts), stream),
         a);
}

}  // namespace

RowTables row_tables(std::int64_t height, std::int64_t width, const Tiles& tiles,
                     const std::vector<float>& kept, const Upload& upload) {
  const int parts = tiles.parts;
  require(parts == 1 || parts == 2 || parts == 4 || parts == 8, "parts must be 1, 2, 4 or 8");
  const LinePasses line = line_passes(width, tiles.row_chirp);
  const bool by_chirp = line.transform == Transform::kChirp;
  return {line,
          to_device(frequency_offsets(width, line), upload),
          to_device(unit_roots(line.passes.length), upload),
          parts > 1 ? to_device(unit_roots(height), upload) : nullptr,
          by_chirp ? chirp_tables(width, line.passes, upload) : Chirp{},
          to_device(kept, upload)};
}

std::size_t row_bytes(std::int64_t points, int parts) {
  return static_cast<std::size_t>(line_count(parts)) *
         static_cast<std::size_t>(line_pitch(static_cast<int>(points))) * sizeof(float2);
}

std::int64_t row_warps(std::int64_t height, const Tiles& tiles) {
  return group_count(height, tiles.parts) * (tiles.row_threads / kWarpSize);
}

void rows_to_spectra(const RowPass& arguments, cudaStream_t stream) {
  launch_rows("rows_to_spectra",
              {rows_to_spectra_kernel<Transform::kCommon>, rows_to_spectra_kernel<Transform::kUncommon>,
               rows_to_spectra_kernel<Transform::kChirp>},
              arguments, stream);
}

void spectra_to_rows(const RowPass& arguments, cudaStream_t stream) {
  launch_rows("spectra_to_rows",
              {spectra_to_rows_kernel<Transform::kCommon>, spectra_to_rows_kernel<Transform::kUncommon>,
               spectra_to_rows_kernel<Transform::kChirp>},
              arguments, stream);
}

}  // namespace freemerge::cuda
