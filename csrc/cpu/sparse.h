// Sparse updates of dense weights, with exact undo.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/select.h"

namespace freemerge {

// Positions of entries in a flattened tensor: int32 or int64, each below the tensor's size and none twice.
struct Indices {
  const void* data;
  bool wide;  // int64
  std::int64_t count;
};

// A change of one tensor: weights[index] = round(origin + scale * value) for every entry, where origin is the
// weight itself, or origin[i] where `origin` is given (count values of the same dtype as the weights). The
// former weights go to `saved` (count entries of that dtype). Arithmetic is float, double for double weights;
// the product is rounded.
struct SparseUpdate {
  void* weights;
  DType dtype;
  std::int64_t n;  // entries of the tensor's memory
  Indices indices;
  const float* values;
  double scale;
  const void* origin;
  void* saved;
};

// Makes the changes one after the other: tensors may share memory. Throws, before anything is written, if an
// index of any of them is outside its [0, n).
void sparse_apply(const std::vector<SparseUpdate>& updates, int threads);

// The exact inverse: weights[index] = saved[i], the last change first.
void sparse_restore(const std::vector<SparseUpdate>& updates, int threads);

struct SparseTerm {
  Indices indices;  // ascending
  const float* values;
  double weight;
};

// sum_j weight_j * values_j over the union of the terms' positions, in the order of the terms.
Selection sparse_sum(const std::vector<SparseTerm>& terms);

}  // namespace freemerge
