// A sparse change of one tensor's dense weights, for every backend.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace freemerge {

// Positions of entries in a tensor's memory: int32 or int64, none twice.
struct Indices {
  const void* data;
  bool wide;  // int64
  std::int64_t count;
};

// weights[index] = round(origin + scale * value) for every entry, where origin is the weight itself, or
// origin[i] where `origin` is given (count values of the same dtype as the weights). Arithmetic is float,
// double for double weights; the product is rounded.
struct SparseUpdate {
  void* weights;
  DType dtype;
  std::int64_t n;   // entries of the tensor's memory
  Indices indices;  // each in [0, n), which callers have checked
  const float* values;
  double scale;
  const void* origin;

  // Bytes that the former weights take; whole words, so that those of several tensors can follow one another.
  std::int64_t saved_bytes() const { return (indices.count * byte_size(dtype) + 7) / 8 * 8; }
};

}  // namespace freemerge
