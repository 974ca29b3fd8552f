#include "cpu/workspace.h"

#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

namespace freemerge {

namespace {

constexpr std::size_t kAlignment = 4096;
constexpr std::size_t kMostKept = std::size_t{32} << 20;  // bytes kept while nobody borrows them

struct Area {
  void* data;
  std::size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::list<Area> areas;  // most recently returned first
  std::size_t bytes = 0;
};

// Leaked on purpose: a thread may still return an area while the process exits.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

}  // namespace

Workspace::Workspace(std::size_t bytes) : bytes_((bytes + kAlignment - 1) / kAlignment * kAlignment) {
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    for (auto area = shared.areas.begin(); area != shared.areas.end(); ++area) {
      // A much larger area would hide memory that another borrower needs.
      if (area->bytes >= bytes_ && area->bytes <= 2 * bytes_) {
        data_ = area->data;
        bytes_ = area->bytes;
        shared.bytes -= bytes_;
        shared.areas.erase(area);
        return;
      }
    }
  }
  data_ = std::aligned_alloc(kAlignment, bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
}

Workspace::~Workspace() {
  std::list<Area> dropped;
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    shared.areas.push_front({data_, bytes_});
    shared.bytes += bytes_;
    while (shared.bytes > kMostKept) {
      shared.bytes -= shared.areas.back().bytes;
      dropped.splice(dropped.end(), shared.areas, std::prev(shared.areas.end()));
    }
  }
  for (const Area& area : dropped) std::free(area.data);
}

}  // namespace freemerge
