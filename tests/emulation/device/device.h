// What CUDA C++ adds to C++, for kernels compiled as plain C++.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <cstring>
#include <type_traits>

#include "emulation/device/scheduler.h"

#define threadIdx (::freemerge::emulation::current().thread)
#define blockIdx (::freemerge::emulation::current().block)
#define blockDim (::freemerge::emulation::current().block_size)
#define gridDim (::freemerge::emulation::current().grid_size)

#undef __launch_bounds__
#define __launch_bounds__(...)

namespace freemerge::emulation {

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T>);
  unsigned char all[32 * sizeof(T)] = {};
  warp_exchange(mask, &value, all, sizeof(T));
  if (source < 0 || source > 31) return value;
  if (!(mask >> source & 1u)) die("shuffle: reads a lane outside the mask");
  T result;
  std::memcpy(&result, all + static_cast<std::size_t>(source) * sizeof(T), sizeof(T));
  return result;
}

}  // namespace freemerge::emulation

inline void __syncthreads() { freemerge::emulation::sync_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  const char nothing = 0;
  char all[32];
  freemerge::emulation::warp_exchange(mask, &nothing, all, 1);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return freemerge::emulation::shuffle(mask, value, source & 31);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return freemerge::emulation::shuffle(mask, value, freemerge::emulation::lane() ^ bits);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  return freemerge::emulation::shuffle(mask, value, freemerge::emulation::lane() - distance);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const char mine = predicate != 0;
  char all[32] = {};
  freemerge::emulation::warp_exchange(mask, &mine, all, 1);
  unsigned bits = 0;
  for (unsigned i = 0; i < 32; ++i) bits |= (mask >> i & 1u) && all[i] ? 1u << i : 0u;
  return bits;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

// Rounded on their own, never fused (compile with -ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
