// Device types of the storage dtypes; arithmetic is float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"
#include "cuda/array.h"
#include "cuda/kernel.cuh"

namespace freemerge::cuda {

__host__ __device__ inline float widen(float x) { return x; }
__host__ __device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float widen(__half x) { return __half2float(x); }

// Round to nearest, ties to even.
template <typename T>
__host__ __device__ T narrow(float x);

template <>
__host__ __device__ inline float narrow<float>(float x) {
  return x;
}

template <>
__host__ __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <>
__host__ __device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Neighbours in one access, where the address allows it.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Neighbours {
  T entries[kCount];
};

template <typename T>
using Quad = Neighbours<T, kQuad>;

// Two neighbours in one access, where the address allows it.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T first;
  T second;
};

// Which of the two entries at an even column exist, and whether one access may take both.
struct PairAccess {
  bool together;
  bool second;
};

template <typename T>
__device__ PairAccess pair_access(const T* matrix, std::int64_t row_stride, std::int64_t column,
                                  std::int64_t width) {
  const bool second = column + 1 < width;
  const bool aligned = reinterpret_cast<std::uintptr_t>(matrix) % sizeof(Pair<T>) == 0 && row_stride % 2 == 0;
  return {second && aligned, second};
}

template <typename T>
__device__ float2 widen(const Pair<T>& pair) {
  return make_float2(widen(pair.first), widen(pair.second));
}

template <typename T>
__device__ Pair<T> load_pair(const T* address, PairAccess access) {
  if (access.together) return load(reinterpret_cast<const Pair<T>*>(address));
  return {load(address), access.second ? load(address + 1) : T{}};
}

template <typename T>
__device__ void store_pair(T* address, PairAccess access, float2 value) {
  if (access.together) {
    store(reinterpret_cast<Pair<T>*>(address), Pair<T>{narrow<T>(value.x), narrow<T>(value.y)});
    return;
  }
  store(address, narrow<T>(value.x));
  if (access.second) store(address + 1, narrow<T>(value.y));
}

// The dtype of an Array is looked at in the kernel: the branch is the same for all threads.
__device__ inline float load_wide(const Array& array, std::int64_t i) {
  if (array.dtype == DType::kFloat32) return load(static_cast<const float*>(array.data) + i);
  if (array.dtype == DType::kBFloat16) return widen(load(static_cast<const __nv_bfloat16*>(array.data) + i));
  return widen(load(static_cast<const __half*>(array.data) + i));
}

template <typename Visitor>
decltype(auto) visit_storage(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(TypeTag<float>{});
    case DType::kBFloat16:
      return visit(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return visit(TypeTag<__half>{});
    case DType::kFloat64:
      break;
  }
  throw std::invalid_argument("the CUDA backend stores float32, bfloat16 and float16");
}

}  // namespace freemerge::cuda
