// Sparse updates as Python hands them over, to the CPU module and to the GPU's.
#pragma once

#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "common/sparse_update.h"

namespace freemerge {

// weights, dtype, n; indices, wide, count; values, scale, origin
using UpdateTuple = std::tuple<std::uintptr_t, int, std::int64_t, std::uintptr_t, bool, std::int64_t,
                               std::uintptr_t, double, std::uintptr_t>;

inline Indices indices_of(std::uintptr_t data, bool wide, std::int64_t count) {
  return {memory<const void>(data, count), wide, count};
}

inline std::vector<SparseUpdate> updates_of(const std::vector<UpdateTuple>& tuples) {
  std::vector<SparseUpdate> updates;
  updates.reserve(tuples.size());
  for (const auto& [weights, dtype, n, indices, wide, count, values, scale, origin] : tuples) {
    updates.push_back({memory<void>(weights, n), to_dtype(dtype), n, indices_of(indices, wide, count),
                       memory<const float>(values, count), scale, pointer<const void>(origin)});
  }
  return updates;
}

}  // namespace freemerge
