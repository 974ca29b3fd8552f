// Uninitialised memory aligned for vector loads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace freemerge {

struct Memory {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// Aligned to 64 bytes. One large piece of what was released is kept for the next call: the system would have
// to clear fresh pages, which takes as long as it takes to read a matrix. It may take those of the kept piece
// back whenever it is short of memory.
Memory allocate(std::size_t bytes);
void release(Memory memory);

template <typename T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : memory_(allocate(static_cast<std::size_t>(size) * sizeof(T))) {}
  Buffer(Buffer&& other) noexcept : memory_(std::exchange(other.memory_, {})) {}
  ~Buffer() { release(memory_); }

  T* data() const { return static_cast<T*>(memory_.data); }

 private:
  Memory memory_;
};

}  // namespace freemerge
