#include "cuda/column_mask.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/mask_gain.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) column_mask_kernel(ColumnMask a) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.columns * a.lines) return;
  const auto [column, along] = split(i, a.lines);
  const Split place = split(a.column_first + column, a.spectrum.column_count);
  const std::int64_t across = load(a.spectrum.bins + place.remainder);
  const double gain = a.transposed ? gain_at(a.mask, across, along) : gain_at(a.mask, along, across);
  const double size = static_cast<double>(a.mask.height) * static_cast<double>(a.mask.width);
  const auto factor = static_cast<float>(a.scale * (gain - a.background) / size);
  float2* value = a.spectrum.data + a.column_first * a.lines + i;
  const float2 old = load(value);
  store(value, make_float2(old.x * factor, old.y * factor));
}

}  // namespace

void column_mask(const ColumnMask& arguments, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.columns * arguments.lines, kThreads)));
  launch(column_mask_kernel, Launch("column_mask", grid, dim3(kThreads), 0, stream), arguments);
}

}  // namespace freemerge::cuda
