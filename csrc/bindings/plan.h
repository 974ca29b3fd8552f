// Parts of a plan as Python describes them, for the CPU module and the GPU's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/plan.h"

namespace freemerge {

// `axis` is a freemerge.planner.plan.Decimation, or None.
inline Decimation to_decimation(const pybind11::handle& axis) {
  if (axis.is_none()) return {};
  return {axis.attr("cells").cast<std::int64_t>(), axis.attr("taps").cast<int>(),
          axis.attr("band").cast<std::int64_t>(), axis.attr("nyquist").cast<bool>()};
}

// `tiles` is a freemerge.planner.tiles.Tiles, or None.
inline Tiles to_tiles(const pybind11::handle& tiles) {
  if (tiles.is_none()) return {};
  return {tiles.attr("parts").cast<int>(),       tiles.attr("columns").cast<int>(),
          tiles.attr("row_threads").cast<int>(), tiles.attr("column_threads").cast<int>(),
          tiles.attr("row_chirp").cast<int>(),   tiles.attr("column_chirp").cast<int>()};
}

}  // namespace freemerge
