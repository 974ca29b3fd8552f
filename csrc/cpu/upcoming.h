// What a worker reads next: it asks for it early, while it transforms what is in cache.
#pragma once

#include <cstdint>

namespace freemerge {

// Spectra up to this size are near enough without.
inline constexpr std::int64_t kNearBytes = 4 << 20;

// Rows of bytes; they may reach past the end of an array.
struct Upcoming {
  std::uintptr_t data = 0;
  std::int64_t rows = 0;
  std::int64_t bytes = 0;   // of a row
  std::int64_t stride = 0;  // from one row to the next, in bytes
};

template <typename T>
Upcoming upcoming(const T* data, std::int64_t rows, std::int64_t count, std::int64_t stride) {
  constexpr auto size = static_cast<std::int64_t>(sizeof(T));
  return {reinterpret_cast<std::uintptr_t>(data), rows, count * size, stride * size};
}

}  // namespace freemerge
