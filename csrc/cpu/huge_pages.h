// Fresh memory of many megabytes: with pages of 4 KB its first touch takes longer than its use.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace freemerge {

// From 32 MB on, the C library maps memory for one allocation and unmaps it with it, so nothing else comes to
// lie in its pages.
inline constexpr std::size_t kLeastHuge = std::size_t{32} << 20;

// Advice on the whole pages of `page` bytes in [data, data + bytes); a system that knows it not refuses.
inline void advise([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes,
                   [[maybe_unused]] std::size_t page, [[maybe_unused]] int advice) {
#if defined(__linux__)
  const auto first = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (first + page - 1) & ~(page - 1), end = (first + bytes) & ~(page - 1);
  madvise(reinterpret_cast<void*>(begin), end - begin, advice);
#endif
}

// Asks for huge pages in [data, data + bytes), as far as whole ones fit, if there are many bytes.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes >= kLeastHuge) advise(data, bytes, std::size_t{2} << 20, MADV_HUGEPAGE);
#endif
}

// Lets the system take the pages back when it needs them, until they are written again.
inline void discard_contents([[maybe_unused]] void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_FREE)
  advise(data, bytes, std::size_t{4} << 10, MADV_FREE);
#endif
}

}  // namespace freemerge
