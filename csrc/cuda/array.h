// A contiguous array in device memory, in its storage dtype.
#pragma once

#include "common/dtype.h"
#include "common/error.h"

namespace freemerge::cuda {

struct Array {
  void* data;
  DType dtype;
};

inline void require_storage(const Array& array) {
  require(array.dtype != DType::kFloat64, "the CUDA backend stores float32, bfloat16 and float16");
}

}  // namespace freemerge::cuda
