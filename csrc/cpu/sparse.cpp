#include "cpu/sparse.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <type_traits>

#include "common/error.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

constexpr std::int64_t kBlock =
    1 << 12;  // entries per task: a matrix of a few million has some for each thread
constexpr std::int64_t kPrefetchAhead = 64;  // entries; each is a cache miss of its own

template <typename Visit>
void visit_indices(const Indices& indices, const Visit& visit) {
  if (indices.wide) {
    visit(static_cast<const std::int64_t*>(indices.data));
  } else {
    visit(static_cast<const std::int32_t*>(indices.data));
  }
}

template <typename T>
T round_sum(T origin, double scale, float value) {
  if constexpr (std::is_same_v<T, double>) {
    return origin + scale * static_cast<double>(value);
  } else {
    const float product = static_cast<float>(scale) * value;
    return round_to<T>(to_float(origin) + product);
  }
}

// visit(i) for every entry, with the weight it concerns on its way to the cache: for reading, as fetching a
// line that no other core has to write it takes longer.
template <typename T, typename Index, typename Visit>
void for_each_entry(const T* weights, const Index* index, std::int64_t count, int threads,
                    const Visit& visit) {
  for_blocks(count, kBlock, threads, [&](std::int64_t, std::int64_t begin, std::int64_t entries) {
    for (std::int64_t i = begin; i < begin + entries; ++i) {
      __builtin_prefetch(weights + index[std::min(i + kPrefetchAhead, count - 1)], 0);
      visit(i);
    }
  });
}

// visit(weights, index), both typed.
template <typename Visit>
void visit_entries(const SparseUpdate& update, const Visit& visit) {
  visit_indices(update.indices, [&](const auto* index) {
    visit_dtype(update.dtype,
                [&](auto tag) { visit(static_cast<typename decltype(tag)::type*>(update.weights), index); });
  });
}

// Sums over a window of positions, and which of these have any.
class Window {
 public:
  static constexpr std::int64_t kSize = 1 << 12;  // its sums stay in the innermost cache

  void add(std::int64_t place, float value) {
    std::uint64_t& word = taken_[static_cast<std::size_t>(place / 64)];
    const std::uint64_t bit = std::uint64_t{1} << (place % 64);
    float& sum = sums_[static_cast<std::size_t>(place)];
    sum = (word & bit) != 0 ? sum + value : value;
    word |= bit;
  }

  // Moves them, in their order, to the end of sums over all positions; the window begins at `first`.
  void move_to(Selection& all, std::int64_t first) {
    for (std::size_t i = 0; i < taken_.size(); ++i) {
      for (; taken_[i] != 0; taken_[i] &= taken_[i] - 1) {
        const std::size_t place = 64 * i + static_cast<std::size_t>(__builtin_ctzll(taken_[i]));
        all.indices.push_back(first + static_cast<std::int64_t>(place));
        all.values.push_back(sums_[place]);
      }
    }
  }

 private:
  std::array<float, kSize> sums_;
  std::array<std::uint64_t, kSize / 64> taken_{};
};

}  // namespace

std::int64_t SparseSwitch::saved_bytes() const {
  return std::accumulate(
      updates_.begin(), updates_.end(), std::int64_t{0},
      [](std::int64_t sum, const SparseUpdate& update) { return sum + update.saved_bytes(); });
}

void SparseSwitch::apply(void* saved, int threads) const {
  char* place = static_cast<char*>(saved);
  for (const SparseUpdate& update : updates_) {
    visit_entries(update, [&](auto* weights, const auto* index) {
      using T = std::remove_pointer_t<decltype(weights)>;
      T* former = reinterpret_cast<T*>(place);
      const T* origin = update.origin == nullptr ? former : static_cast<const T*>(update.origin);
      const float* values = update.values;
      const double scale = update.scale;
      for_each_entry(weights, index, update.indices.count, threads, [=](std::int64_t i) {
        former[i] = weights[index[i]];
        weights[index[i]] = round_sum(origin[i], scale, values[i]);
      });
    });
    place += update.saved_bytes();
  }
}

void SparseSwitch::restore(const void* saved, int threads) const {
  const char* place = static_cast<const char*>(saved) + saved_bytes();
  for (auto update = updates_.rbegin(); update != updates_.rend(); ++update) {
    place -= update->saved_bytes();
    visit_entries(*update, [&](auto* weights, const auto* index) {
      using T = std::remove_pointer_t<decltype(weights)>;
      const T* former = reinterpret_cast<const T*>(place);
      for_each_entry(weights, index, update->indices.count, threads,
                     [=](std::int64_t i) { weights[index[i]] = former[i]; });
    });
  }
}

Selection sparse_sum(const std::vector<SparseTerm>& terms) {
  constexpr std::int64_t kNone = std::numeric_limits<std::int64_t>::max();
  Selection sum;
  Window window;
  std::vector<std::int64_t> done(terms.size());  // entries of each term
  for (std::int64_t first = 0; first != kNone;) {
    std::int64_t next = kNone;  // the least position after the window
    for (std::size_t t = 0; t < terms.size(); ++t) {
      const SparseTerm& term = terms[t];
      const float weight = static_cast<float>(term.weight);
      visit_indices(term.indices, [&](const auto* index) {
        std::int64_t i = done[t];
        for (; i < term.indices.count && index[i] - first < Window::kSize; ++i) {
          require(index[i] > (i == 0 ? -1 : index[i - 1]), "sparse indices must be ascending");
          const float value = weight * term.values[i];
          window.add(index[i] - first, value);
        }
        done[t] = i;
        if (i < term.indices.count) {
          next = std::min(next, static_cast<std::int64_t>(index[i]));
        }
      });
    }
    window.move_to(sum, first);
    first = next;
  }
  return sum;
}

}  // namespace freemerge
