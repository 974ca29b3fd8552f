// Shared by the loops over stored arrays that are compiled once per instruction set. Included only by those
// files, inside their own namespaces.
#pragma once

#include <cstdint>

#include "cpu/accumulate.h"

namespace freemerge {
namespace FREEMERGE_ISA {
namespace {

constexpr std::int64_t kChunk = 512;  // entries converted at a time

// Reads of many streams outrun the hardware prefetcher: ask for the entries two chunks ahead.
[[maybe_unused]] void prefetch(Storage source, std::int64_t begin, std::int64_t count) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t size = byte_size(source.dtype);
  const auto first = reinterpret_cast<std::uintptr_t>(source.data) +
                     static_cast<std::uintptr_t>((begin + 2 * kChunk) * size);  // may lie past the end
  for (std::int64_t at = 0; at < count * size; at += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<std::uintptr_t>(at)), 0, 2);
  }
}

}  // namespace
}  // namespace FREEMERGE_ISA
}  // namespace freemerge
