// Sums over a block in a fixed order.
#pragma once

#include "cuda/kernel.cuh"

namespace freemerge::cuda {

constexpr int kWarpSize = 32;

__device__ inline double squared(float x) { return static_cast<double>(x) * static_cast<double>(x); }

// The sum over a warp, in all of its lanes.
template <typename T>
__device__ T warp_sum(T value) {
  for (int bits = kWarpSize / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  return value;
}

// The sum over all threads, in thread 0. `scratch` is shared memory for one value a warp; the block must be a
// whole number of warps and synchronise before `scratch` is used again.
template <typename T>
__device__ T block_sum(T value, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) scratch[warp] = value;
  __syncthreads();
  T sum = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) sum += scratch[i];
  }
  return sum;
}

// The sum over all threads before this one; `total` is that over all. Scratch as above.
template <typename T>
__device__ T block_prefix_sum(T value, T* scratch, T* total) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  T inclusive = value;
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T before = __shfl_up_sync(0xffffffffu, inclusive, distance);
    if (lane >= distance) inclusive += before;
  }
  if (lane == kWarpSize - 1) scratch[warp] = inclusive;
  __syncthreads();
  T offset = 0;
  T sum = 0;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarpSize; ++i) {
    if (i < warp) offset += scratch[i];
    sum += scratch[i];
  }
  *total = sum;
  return offset + inclusive - value;
}

}  // namespace freemerge::cuda
