// A mask as Python describes it, for the CPU module and the GPU's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "bindings/bindings.h"
#include "common/mask.h"

namespace freemerge {

// `params` is a freemerge.responses.MaskParams. `table` is for masks of kind "table" only: their gains, in
// the memory of the device that filters.
inline Mask to_mask(const pybind11::handle& params, const float* table) {
  const auto number = [&](const char* name) { return params.attr(name).cast<double>(); };
  Mask mask;
  mask.kind = named(kMaskNames, params.attr("kind").cast<std::string>(), "mask kind").kind;
  mask.height = params.attr("height").cast<std::int64_t>();
  mask.width = params.attr("width").cast<std::int64_t>();
  mask.unit_y = number("unit_y");
  mask.unit_x = number("unit_x");
  mask.edge0 = number("edge0");
  mask.edge1 = number("edge1");
  mask.gain0 = number("gain0");
  mask.gain1 = number("gain1");
  mask.gain2 = number("gain2");
  mask.order = number("order");
  mask.axis = params.attr("axis").cast<int>();
  mask.table = table;
  require(mask.height >= 1 && mask.width >= 1, "height and width must be at least 1");
  require((mask.kind == MaskKind::kTable) == (table != nullptr),
          "a mask of kind 'table' needs the address of its table, and no other kind takes one");
  return mask;
}

}  // namespace freemerge
