// Device types of the storage dtypes; arithmetic is float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/array.h"
#include "cuda/kernel.cuh"
#include "dtype.h"

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

// The dtype of an Array is looked at in the kernel: the branch is the same for all threads.
__device__ inline float load_wide(const Array& array, std::int64_t i) {
  if (array.dtype == DType::kFloat32) return load(static_cast<const float*>(array.data) + i);
  if (array.dtype == DType::kBFloat16) return widen(load(static_cast<const __nv_bfloat16*>(array.data) + i));
  return widen(load(static_cast<const __half*>(array.data) + i));
}

__device__ inline void store_narrow(const Array& array, std::int64_t i, float value) {
  if (array.dtype == DType::kFloat32) {
    store(static_cast<float*>(array.data) + i, value);
  } else if (array.dtype == DType::kBFloat16) {
    store(static_cast<__nv_bfloat16*>(array.data) + i, narrow<__nv_bfloat16>(value));
  } else {
    store(static_cast<__half*>(array.data) + i, narrow<__half>(value));
  }
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
