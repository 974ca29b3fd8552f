#pragma once

#include <cstdint>
#include <vector>

namespace freemerge {

// Memory that vectors hold.
template <typename... T>
std::int64_t vector_bytes(const std::vector<T>&... vectors) {
  return (std::int64_t{0} + ... + static_cast<std::int64_t>(vectors.capacity() * sizeof(T)));
}

}  // namespace freemerge
