// The inner loops of select.cpp, compiled once per instruction set.
#pragma once

#include <cstdint>

#include "cpu/select.h"

namespace freemerge {

// Entries [begin, begin + count) with magnitude bits >= threshold: their offsets from `begin` and values, in
// order, into buffers of `count` entries. Returns how many.
using CollectKernel = std::int64_t (*)(const TaskVector& v, std::int64_t begin, std::int64_t count,
                                       std::uint32_t threshold, std::uint32_t* offsets, float* values);
// Counts the entries [begin, begin + count) into bins[kMagnitudeBins].
using CountKernel = void (*)(const TaskVector& v, std::int64_t begin, std::int64_t count,
                             std::uint32_t* bins);

#define FREEMERGE_DECLARE_SELECT(isa)                                                                 \
  namespace isa {                                                                                     \
  std::int64_t collect_range(const TaskVector& v, std::int64_t begin, std::int64_t count,             \
                             std::uint32_t threshold, std::uint32_t* offsets, float* values);         \
  void count_range(const TaskVector& v, std::int64_t begin, std::int64_t count, std::uint32_t* bins); \
  }
FREEMERGE_DECLARE_SELECT(baseline)
#if defined(__x86_64__)
FREEMERGE_DECLARE_SELECT(avx2)
FREEMERGE_DECLARE_SELECT(avx512)
#endif
#undef FREEMERGE_DECLARE_SELECT

}  // namespace freemerge
