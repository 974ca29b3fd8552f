#include <algorithm>

#include "cuda/coarse_bins.h"
#include "cuda/coarse_mask.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;

// `dx` is the offset from the centre of the band.
__device__ void mask_bin(const CoarseMask& a, std::int64_t row, std::int64_t dx) {
  const CoarseBin bin = coarse_bin(row, a.rows, a.mask.height);
  float factor = 0.0f;
  const bool inside = bin.inside && dx < a.columns.band;
  if (inside) {
    const std::int64_t x = dx + (a.columns.nyquist ? a.mask.width / 2 : 0);
    // Before the rest: little must survive its calls in registers.
    const double gain = gain_at(a.mask, bin.y, x);
    const double window =
        load(a.rows.transform + bin.distance) * (a.columns.whole() ? 1.0 : load(a.columns.transform + dx));
    const double size = static_cast<double>(a.mask.height) * static_cast<double>(a.mask.width);
    factor = static_cast<float>(a.scale * (gain - a.background) / (size * window * window));
  }
  for (int i = 0; i < a.grids.count; ++i) {
    float2* value = reinterpret_cast<float2*>(a.grids.data + i * a.grids.step + row * a.grids.pitch) + dx;
    if (inside) {
      const float2 old = load(value);
      store(value, make_float2(old.x * factor, old.y * factor));
    } else {
      store(value, make_float2(0.0f, 0.0f));
    }
  }
}

__global__ void __launch_bounds__(kThreads, 2) coarse_mask_kernel(CoarseMask a) {
  const std::int64_t dx = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (dx > a.grids.columns / 2) return;
  const std::int64_t rows = grid_rows(a.rows, a.mask.height);
  for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) mask_bin(a, row, dx);
}

}  // namespace

void coarse_mask(const CoarseMask& arguments, cudaStream_t stream) {
  const std::int64_t rows = grid_rows(arguments.rows, arguments.mask.height);
  const dim3 grid(static_cast<unsigned>(ceil_div(arguments.grids.columns / 2 + 1, kThreads)),
                  static_cast<unsigned>(std::min<std::int64_t>(rows, 65535)));
  launch(coarse_mask_kernel, Launch("coarse_mask", grid, dim3(kThreads), 0, stream), arguments);
}

}  // namespace freemerge::cuda
