// How a filter divides its workspace: buffers first, then the work area that its cuFFT transforms share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace freemerge::cuda {

// Hands out parts of the workspace; with no memory behind it, it only adds them up.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(std::int64_t count) {
    T* part = static_cast<T*>(rest());
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }

  std::size_t used() const { return used_; }
  void* rest() const { return memory_ ? memory_ + used_ : nullptr; }

 private:
  static constexpr std::size_t kAlignment = 256;

  char* memory_;
  std::size_t used_ = 0;
};

// How many items of `bytes` fit into a budget, within limits.
inline std::int64_t fit(std::size_t budget, std::int64_t bytes, std::int64_t low, std::int64_t high) {
  const std::int64_t count = static_cast<std::int64_t>(budget) / std::max<std::int64_t>(bytes, 1);
  return std::min(std::max(count, low), std::max(low, high));
}

}  // namespace freemerge::cuda
