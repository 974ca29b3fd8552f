// Sparse experts on dense weights: all tensors of one device at once, undone bit for bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/sparse_update.h"
#include "cuda/heuristics.h"

namespace freemerge::cuda {

struct SparseJob {
  void* weights;
  const void* indices;
  const float* values;
  const void* origin;    // null: the weights themselves
  std::int64_t count;    // entries
  std::int64_t saved;    // where its former weights begin, in bytes
  unsigned first_block;  // of the launch
  float scale;
  DType dtype;
  bool wide;  // int64 indices
};

// What one launch does: jobs on memories that do not overlap, as kernel arguments.
struct SparseBatch {
  SparseJob jobs[heuristics::kUpdatesPerLaunch];
  int count;
  unsigned blocks;
  char* saved;
};
static_assert(sizeof(SparseBatch) <= 4096, "kernel arguments take 4 KiB");

// Changes of several tensors, made in order and undone the last first. As many as can share a launch.
class SparseSwitch {
 public:
  explicit SparseSwitch(const std::vector<SparseUpdate>& updates);

  // Bytes of device memory that apply() fills with the former weights, and restore() wants back.
  std::int64_t saved_bytes() const { return saved_bytes_; }
  std::size_t launches() const { return batches_.size(); }
  void apply(void* saved, cudaStream_t stream) const;
  void restore(void* saved, cudaStream_t stream) const;

 private:
  void restore_first(std::size_t batches, void* saved, cudaStream_t stream) const;

  std::vector<SparseBatch> batches_;
  std::int64_t saved_bytes_ = 0;
};

}  // namespace freemerge::cuda
