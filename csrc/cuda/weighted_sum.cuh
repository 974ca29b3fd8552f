// The weighted sum of task vectors, eight neighbouring entries a thread: the only place that forms them.
#pragma once

#include <cstdint>

#include "cuda/entries.cuh"
#include "cuda/kernel.cuh"
#include "cuda/task_vectors.h"

namespace freemerge::cuda {

// Adds weights[i] * v_i of entries first .. first + 7 to `sum`, model after model, each product rounded
// before it is added; `fresh` says that there is no earlier models' sum in it. Entries from `end` on count as
// zeros. Calls visit(model, sum of the |v_i|).
template <typename Visit>
__device__ void add_weighted(const TaskVectors& vectors, std::int64_t first, std::int64_t end, bool fresh,
                             float (&sum)[kEntries], Visit visit) {
  StoredEntries next = fetch(vectors.models[0], first, end);
  float base[kEntries];
  widen(fetch(vectors.base, first, end), vectors.base.dtype, base);
#pragma unroll 1
  for (int m = 0; m < vectors.count; ++m) {
    float entries[kEntries];
    const StoredEntries stored = next;
    if (m + 1 < vectors.count) next = fetch(vectors.models[m + 1], first, end);  // on its way meanwhile
    widen(stored, vectors.models[m].dtype, entries);
    double magnitudes = 0.0;
#pragma unroll
    for (int e = 0; e < kEntries; ++e) {
      const float v = __fsub_rn(entries[e], base[e]);
      magnitudes += static_cast<double>(fabsf(v));
      const float weighted = __fmul_rn(vectors.weights[m], v);
      sum[e] = fresh && m == 0 ? weighted : __fadd_rn(sum[e], weighted);
    }
    visit(m, magnitudes);
  }
}

}  // namespace freemerge::cuda
