// A sparse expert on dense weights: apply and undo, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/array.h"

namespace freemerge::cuda {

struct SparseUpdate {
  Array weights;        // dense
  const void* indices;  // distinct: int64 if `wide`, else int32
  bool wide;
  std::int64_t count;
  void* saved;  // `count` entries of the weights' dtype: what they were
};

// weights[i] = start + scale * value for each index, rounded to float twice and to the weights' dtype once.
// The start is `origin` (one entry of the weights' dtype for each index), or the weight itself where that is
// null.
void sparse_apply(const SparseUpdate& update, const float* values, float scale, const void* origin,
                  cudaStream_t stream);

// weights[indices[i]] = saved[i]
void sparse_restore(const SparseUpdate& update, cudaStream_t stream);

}  // namespace freemerge::cuda
