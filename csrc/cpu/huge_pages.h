// Fresh memory of many megabytes: with pages of 4 KB its first touch takes longer than its use.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace freemerge {

// Asks for huge pages in [data, data + bytes), as far as whole ones fit. Only from 32 MB on: the C library
// maps such memory for one allocation and unmaps it with it, so nothing else comes to lie in these pages.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::size_t kLeast = std::size_t{32} << 20;
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  if (bytes < kLeast) return;
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (first + kPage - 1) & ~(kPage - 1), end = (first + bytes) & ~(kPage - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a system without them refuses
#endif
}

}  // namespace freemerge
