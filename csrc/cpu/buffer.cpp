#include "cpu/buffer.h"

#include <mutex>
#include <new>

#include "cpu/huge_pages.h"

namespace freemerge {
namespace {

constexpr std::align_val_t kAlignment{64};

// Smaller pieces the C library keeps itself; larger ones are too much to keep.
constexpr std::size_t kLeastKept = kLeastHuge, kMostKept = std::size_t{256} << 20;

class Kept {
 public:
  ~Kept() { free(memory_); }

  Memory take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Memory found = std::exchange(memory_, {});
    if (found.bytes >= bytes) return found;
    free(found);
    return {};
  }

  void give(Memory memory) {
    discard_contents(memory.data, memory.bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (memory.bytes > memory_.bytes) std::swap(memory, memory_);
    free(memory);
  }

  static void free(Memory memory) { ::operator delete(memory.data, kAlignment); }

 private:
  std::mutex mutex_;
  Memory memory_;
};

Kept kept;

}  // namespace

Memory allocate(std::size_t bytes) {
  if (bytes >= kLeastKept) {
    if (const Memory found = kept.take(bytes); found.data != nullptr) return found;
  }
  const Memory fresh{::operator new(bytes, kAlignment), bytes};
  prefer_huge_pages(fresh.data, bytes);
  return fresh;
}

void release(Memory memory) {
  if (memory.bytes >= kLeastKept && memory.bytes <= kMostKept) return kept.give(memory);
  Kept::free(memory);
}

}  // namespace freemerge
