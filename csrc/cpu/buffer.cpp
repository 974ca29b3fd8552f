#include "cpu/buffer.h"

#include <mutex>
#include <new>

#include "cpu/huge_pages.h"

namespace freemerge {
namespace {

constexpr std::align_val_t kAlignment{64};

// Smaller pieces the C library keeps itself; larger ones are too much to keep.
constexpr std::size_t kLeastKept = kLeastHuge, kMostKept = std::size_t{256} << 20;

// Nobody waits for the lock: in a forked process it stays locked if a thread of the parent had it just then.
class Kept {
 public:
  Memory take(std::size_t bytes) {
    const Memory found = exchange([](const Memory&) { return true; }, {});
    if (found.bytes >= bytes) return found;
    free(found);
    return {};
  }

  void give(Memory memory) {
    discard_contents(memory.data, memory.bytes);
    free(exchange([&](const Memory& kept) { return memory.bytes > kept.bytes; }, memory));
  }

  static void free(Memory memory) { ::operator delete(memory.data, kAlignment); }

 private:
  // Puts `memory` in the place of what is kept, if that is wanted and the lock is free; what is left over.
  template <typename Wanted>
  Memory exchange(const Wanted& wanted, Memory memory) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock && wanted(memory_) ? std::exchange(memory_, memory) : memory;
  }

  std::mutex mutex_;
  Memory memory_;
};

Kept& kept = *new Kept;  // never destroyed: threads may still filter while the process exits

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
