// A sparse expert on dense weights: apply and undo, bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/array.h"

namespace freemerge::cuda {

struct SparseUpdate {
  Array weights;                // dense
  const std::int64_t* indices;  // distinct
  Array values;
  std::int64_t count;
  float scale;
  bool replace;  // weights[i] = scale * value instead of weights[i] + scale * value
  void* saved;   // `count` entries of the weights' dtype: what they were
};

void sparse_apply(const SparseUpdate& update, cudaStream_t stream);

// weights[indices[i]] = saved[i]; the update's values are not looked at.
void sparse_undo(const SparseUpdate& update, cudaStream_t stream);

}  // namespace freemerge::cuda
