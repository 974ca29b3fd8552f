// Sparse updates of dense weights, with exact undo.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/sparse_update.h"
#include "cpu/select.h"

namespace freemerge {

// Changes of several tensors, made one after the other (tensors may share memory) and undone the last first.
class SparseSwitch {
 public:
  explicit SparseSwitch(std::vector<SparseUpdate> updates) : updates_(std::move(updates)) {}

  // Bytes that apply() fills with the former weights, and restore() wants back.
  std::int64_t saved_bytes() const;
  void apply(void* saved, int threads) const;
  void restore(const void* saved, int threads) const;

 private:
  std::vector<SparseUpdate> updates_;
};

struct SparseTerm {
  Indices indices;  // ascending
  const float* values;
  double weight;
};

// sum_j weight_j * values_j over the union of the terms' positions, in the order of the terms.
Selection sparse_sum(const std::vector<SparseTerm>& terms);

}  // namespace freemerge
