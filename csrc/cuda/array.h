// A contiguous array in device memory, in its storage dtype.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/error.h"

namespace freemerge::cuda {

struct Array {
  void* data;
  DType dtype;
};

// Neighbours of a row that passes of a filter take in one access where they can; and whether they can in all
// rows of an array, lying end to end.
constexpr int kQuad = 4;

inline bool in_quads(const Array& array, std::int64_t width) {
  return width % kQuad == 0 && reinterpret_cast<std::uintptr_t>(array.data) % (kQuad * sizeof(float)) == 0;
}

inline void require_storage(const Array& array) {
  require(array.dtype != DType::kFloat64, "the CUDA backend stores float32, bfloat16 and float16");
}

}  // namespace freemerge::cuda
