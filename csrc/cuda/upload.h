// How tables get to the device.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace freemerge::cuda {

// Copies bytes to the device of a filter, waits for the copy and returns its address. Whoever makes the
// filter keeps the memory.
using Upload = std::function<const void*(const void* bytes, std::size_t count)>;

template <typename T>
const T* to_device(const std::vector<T>& values, const Upload& upload) {
  return static_cast<const T*>(upload(values.data(), values.size() * sizeof(T)));
}

}  // namespace freemerge::cuda
