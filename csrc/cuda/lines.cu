#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/lines.cuh"
#include "cuda/storage.cuh"

namespace freemerge::cuda {
namespace {

// All four kernels move 32 x 32 tiles through shared memory, so that both sides are read and written along
// their contiguous axis. The tiles of a launch are numbered along the lines first.
constexpr int kTile = 32;
constexpr int kWarps = 8;
constexpr int kPitch = kTile + 1;

struct Tile {
  std::int64_t line;    // relative to the stage
  std::int64_t column;  // sample or bin
};

__device__ Tile tile_of_block(std::int64_t columns) {
  const Split tile = split(blockIdx.x, ceil_div(columns, kTile));
  return {tile.quotient * kTile, tile.remainder * kTile};
}

unsigned tile_count(std::int64_t lines, std::int64_t columns) {
  return static_cast<unsigned>(ceil_div(lines, kTile) * ceil_div(columns, kTile));
}

// Calls visit(line, column, shared element) for each element of the tile; consecutive threads take
// consecutive columns, or lines if `along_lines`.
template <typename Visit>
__device__ void for_each(const Tile& tile, std::int64_t lines, std::int64_t columns, bool along_lines,
                         Visit visit) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = static_cast<int>(threadIdx.y); i < kTile; i += kWarps) {
    const int l = along_lines ? lane : i;
    const int c = along_lines ? i : lane;
    if (tile.line + l < lines && tile.column + c < columns)
      visit(tile.line + l, tile.column + c, l * kPitch + c);
  }
}

template <typename T>
__device__ T* matrix_entry(const LineCopy& a, std::int64_t line, std::int64_t sample) {
  const auto [matrix, within] = split(a.stage.line_begin + line, a.stage.lines);
  const std::int64_t stride = a.matrices.row_stride[matrix];
  return static_cast<T*>(a.matrices.data[matrix]) +
         (a.transposed ? sample * stride + within : within * stride + sample);
}

template <typename T>
__global__ void __launch_bounds__(kTile* kWarps) pack_kernel(LineCopy a) {
  float* shared = shared_memory<float>();
  const Tile tile = tile_of_block(a.stage.length);
  for_each(tile, a.stage.line_count, a.stage.length, a.transposed,
           [&](std::int64_t line, std::int64_t sample, int at) {
             shared[at] = widen(load(matrix_entry<T>(a, line, sample)));
           });
  __syncthreads();
  for_each(tile, a.stage.line_count, a.stage.length, false,
           [&](std::int64_t line, std::int64_t sample, int at) {
             store(a.stage.data + line * a.stage.pitch + sample, shared[at]);
           });
}

template <typename T>
__global__ void __launch_bounds__(kTile* kWarps) unpack_kernel(LineCopy a) {
  float* shared = shared_memory<float>();
  const Tile tile = tile_of_block(a.stage.length);
  for_each(tile, a.stage.line_count, a.stage.length, false,
           [&](std::int64_t line, std::int64_t sample, int at) {
             shared[at] = load(a.stage.data + line * a.stage.pitch + sample);
           });
  __syncthreads();
  for_each(tile, a.stage.line_count, a.stage.length, a.transposed,
           [&](std::int64_t line, std::int64_t sample, int at) {
             T* entry = matrix_entry<T>(a, line, sample);
             // A gain of zero must not turn an infinity that is about to be overwritten into NaN.
             const float kept = a.gain == 0.0f ? 0.0f : a.gain * widen(load(entry));
             store(entry, narrow<T>(kept + shared[at]));
           });
}

__device__ float2* spectrum_entry(const SpectrumCopy& a, std::int64_t line, std::int64_t column) {
  const auto [matrix, within] = split(a.stage.line_begin + line, a.stage.lines);
  return a.spectrum.data + (matrix * a.spectrum.column_count + column) * a.stage.lines + within;
}

__device__ float2* stage_bin(const Stage& stage, std::int64_t line, std::int64_t bin) {
  return reinterpret_cast<float2*>(stage.data + line * stage.pitch) + bin;
}

__global__ void __launch_bounds__(kTile* kWarps) gather_kernel(SpectrumCopy a) {
  float2* shared = shared_memory<float2>();
  const Tile tile = tile_of_block(a.spectrum.column_count);
  for_each(tile, a.stage.line_count, a.spectrum.column_count, false,
           [&](std::int64_t line, std::int64_t column, int at) {
             shared[at] = load(stage_bin(a.stage, line, load(a.spectrum.bins + column)));
           });
  __syncthreads();
  for_each(tile, a.stage.line_count, a.spectrum.column_count, true,
           [&](std::int64_t line, std::int64_t column, int at) {
             store(spectrum_entry(a, line, column), shared[at]);
           });
}

__global__ void __launch_bounds__(kTile* kWarps) scatter_kernel(SpectrumCopy a) {
  float2* shared = shared_memory<float2>();
  const std::int64_t bins = a.stage.length / 2 + 1;
  const Tile tile = tile_of_block(bins);
  for_each(tile, a.stage.line_count, bins, true, [&](std::int64_t line, std::int64_t bin, int at) {
    const std::int64_t column = load(a.spectrum.place + bin);
    shared[at] = column >= 0 ? load(spectrum_entry(a, line, column)) : make_float2(0.0f, 0.0f);
  });
  __syncthreads();
  for_each(tile, a.stage.line_count, bins, false, [&](std::int64_t line, std::int64_t bin, int at) {
    store(stage_bin(a.stage, line, bin), shared[at]);
  });
}

template <typename Element>
Launch tiles(const char* name, std::int64_t lines, std::int64_t columns, cudaStream_t stream,
             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return Launch(name, dim3(tile_count(lines, columns)), dim3(kTile, kWarps), kTile * kPitch * sizeof(Element),
                stream, file, line);
}

}  // namespace

void pack(const LineCopy& arguments, cudaStream_t stream) {
  const Launch how = tiles<float>("pack", arguments.stage.line_count, arguments.stage.length, stream);
  visit_storage(arguments.matrices.dtype,
                [&](auto tag) { launch(pack_kernel<typename decltype(tag)::type>, how, arguments); });
}

void unpack(const LineCopy& arguments, cudaStream_t stream) {
  const Launch how = tiles<float>("unpack", arguments.stage.line_count, arguments.stage.length, stream);
  visit_storage(arguments.matrices.dtype,
                [&](auto tag) { launch(unpack_kernel<typename decltype(tag)::type>, how, arguments); });
}

void gather(const SpectrumCopy& arguments, cudaStream_t stream) {
  launch(gather_kernel,
         tiles<float2>("gather", arguments.stage.line_count, arguments.spectrum.column_count, stream),
         arguments);
}

void scatter(const SpectrumCopy& arguments, cudaStream_t stream) {
  launch(scatter_kernel,
         tiles<float2>("scatter", arguments.stage.line_count, arguments.stage.length / 2 + 1, stream),
         arguments);
}

}  // namespace freemerge::cuda
