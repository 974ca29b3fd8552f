// A bounded, thread-safe cache of immutable tables: the least recently used entry goes first.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <utility>

namespace freemerge {

// Key is compared with ==; a few dozen entries, so a list is searched faster than anything could be hashed.
template <typename Key, typename Value>
class LruCache {
 public:
  explicit LruCache(std::size_t capacity) : capacity_(capacity) {}

  // The value of `key`; `build()` makes it outside the lock, so two threads may build the same value once
  // each.
  template <typename Build>
  std::shared_ptr<const Value> get(const Key& key, Build&& build) {
    if (auto found = find(key)) return found;
    auto built = std::make_shared<const Value>(build());
    const std::lock_guard<std::mutex> lock(mutex_);
    entries_.emplace_front(key, built);
    if (entries_.size() > capacity_) entries_.pop_back();
    return built;
  }

 private:
  std::shared_ptr<const Value> find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry) {
      if (entry->first == key) {
        entries_.splice(entries_.begin(), entries_, entry);
        return entry->second;
      }
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::size_t capacity_;
  std::list<std::pair<Key, std::shared_ptr<const Value>>> entries_;
};

}  // namespace freemerge
