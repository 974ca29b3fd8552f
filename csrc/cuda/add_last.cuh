// The last step of a merge where it is part of a filter's last pass.
#pragma once

#include "cuda/kernel.cuh"
#include "cuda/storage.cuh"
#include "cuda/task_vectors.h"

namespace freemerge::cuda {

// Calls visit(first entry) in an array's dtype; the branch is the same for all threads.
template <typename Visit>
__device__ void visit_entries(const Array& array, Visit visit) {
  if (array.dtype == DType::kFloat32) {
    visit(static_cast<float*>(array.data));
  } else if (array.dtype == DType::kBFloat16) {
    visit(static_cast<__nv_bfloat16*>(array.data));
  } else {
    visit(static_cast<__half*>(array.data));
  }
}

__device__ inline float added(const AddLast& add, float base, float sum) {
  return __fadd_rn(base, __fmul_rn(add.scale, __fmul_rn(add.factor, sum)));
}

}  // namespace freemerge::cuda
