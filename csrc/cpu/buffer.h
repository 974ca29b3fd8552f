// Uninitialised memory aligned for vector loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#include "cpu/huge_pages.h"

namespace freemerge {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t size) {
    const std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    data_ = static_cast<T*>(::operator new(bytes, kAlignment));
    prefer_huge_pages(data_, bytes);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() { ::operator delete(data_, kAlignment); }

  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_ = nullptr;
};

}  // namespace freemerge
