#include <algorithm>

#include "cuda/coarse_bins.h"
#include "cuda/coarse_mask.cuh"
#include "cuda/kernel.cuh"
#include "cuda/launch_math.h"
#include "cuda/reduce.cuh"

namespace freemerge::cuda {
namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 65535;   // of a grid, along its rows
constexpr std::int64_t kEnergyBlocks = 512;  // the same, where another kernel adds up what they find

// `dx` is the offset from the centre of the band. Returns the bin's energy if that is wanted.
template <bool kEnergies>
__device__ double mask_bin(const CoarseMask& a, std::int64_t row, std::int64_t dx) {
  const CoarseBin bin = coarse_bin(row, a.rows, a.mask.height);
  float factor = 0.0f;
  double energy = 0.0;  // of a value whose square is 1
  double taken = 0.0;   // by the centre from the real part
  const bool inside = bin.inside && dx < a.columns.band;
  if (inside) {
    const std::int64_t x = dx + (a.columns.nyquist ? a.mask.width / 2 : 0);
    // Before the rest: little must survive its calls in registers.
    const double gain = gain_at(a.mask, bin.y, x);
    const double window =
        load(a.rows.transform + bin.distance) * (a.columns.whole() ? 1.0 : load(a.columns.transform + dx));
    const double size = static_cast<double>(a.mask.height) * static_cast<double>(a.mask.width);
    const double share = a.scale * (gain - a.background) / (size * window * window);
    factor = static_cast<float>(share);
    if constexpr (kEnergies) {
      const bool alone = dx == 0 || 2 * dx == a.grids.columns;  // else its mirror has as much
      energy = share * (gain + a.background) * (alone ? 1.0 : 2.0);
      if (bin.y == 0 && x == 0) taken = static_cast<double>(load(a.center)) * size * window;
    }
  }
  for (int i = 0; i < a.grids.count; ++i) {
    float2* value = reinterpret_cast<float2*>(a.grids.data + i * a.grids.step + row * a.grids.pitch) + dx;
    if (inside) {
      const float2 old = load(value);
      if constexpr (kEnergies) {
        const double real = static_cast<double>(old.x) + taken;
        energy *= real * real + squared(old.y);
      }
      store(value, make_float2(old.x * factor, old.y * factor));
    } else {
      store(value, make_float2(0.0f, 0.0f));
    }
  }
  return energy;
}

template <bool kEnergies>
__global__ void __launch_bounds__(kThreads, 2) coarse_mask_kernel(CoarseMask a) {
  const std::int64_t dx = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const std::int64_t rows = dx <= a.grids.columns / 2 ? grid_rows(a.rows, a.mask.height) : 0;
  double energy = 0.0;
  for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) energy += mask_bin<kEnergies>(a, row, dx);
  if constexpr (kEnergies) {
    energy = block_sum(energy, shared_memory<double>());
    if (threadIdx.x == 0) store(a.energies + blockIdx.y * gridDim.x + blockIdx.x, energy);
  }
}

dim3 blocks(const CoarseGrids& grids, std::int64_t most) {
  return dim3(static_cast<unsigned>(ceil_div(grids.columns / 2 + 1, kThreads)),
              static_cast<unsigned>(std::min(grids.step / grids.pitch, most)));
}

}  // namespace

void coarse_mask(const CoarseMask& arguments, cudaStream_t stream) {
  const bool sums = arguments.energies != nullptr;
  const std::size_t scratch = sums ? kThreads / kWarpSize * sizeof(double) : 0;
  launch(sums ? coarse_mask_kernel<true> : coarse_mask_kernel<false>,
         Launch("coarse_mask", blocks(arguments.grids, sums ? kEnergyBlocks : kMaxBlocks), dim3(kThreads),
                scratch, stream),
         arguments);
}

std::int64_t coarse_mask_blocks(const CoarseGrids& grids) {
  const dim3 grid = blocks(grids, kEnergyBlocks);
  return static_cast<std::int64_t>(grid.x) * grid.y;
}

}  // namespace freemerge::cuda
