// The inner loops of select.cpp, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/select.h"

namespace freemerge {

// Entries [begin, begin + count) with magnitude bits >= threshold: their offsets from `begin` and values, in
// order, into buffers of `count` entries. Returns how many.
using CollectRange = std::int64_t(const TaskVector& v, std::int64_t begin, std::int64_t count,
                                  std::uint32_t threshold, std::uint32_t* offsets, float* values);
// Counts the entries [begin, begin + count) into counts[1 << bins.bits].
using CountRange = void(const TaskVector& v, std::int64_t begin, std::int64_t count, MagnitudeBins bins,
                        std::uint32_t* counts);

}  // namespace freemerge
