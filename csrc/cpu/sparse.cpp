#include "cpu/sparse.h"

#include <algorithm>
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
  parallel_for((count + kBlock - 1) / kBlock, threads, [&](std::int64_t block, int) {
    const std::int64_t end = std::min(count, (block + 1) * kBlock);
    for (std::int64_t i = block * kBlock; i < end; ++i) {
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

template <typename Index>
Selection weighted(const Index* index, const SparseTerm& term) {
  Selection result;
  result.indices.assign(index, index + term.indices.count);
  result.values.resize(static_cast<std::size_t>(term.indices.count));
  const float weight = static_cast<float>(term.weight);
  std::transform(term.values, term.values + term.indices.count, result.values.begin(),
                 [weight](float value) { return weight * value; });
  return result;
}

Selection merged(const Selection& a, const Selection& b) {
  Selection sum;
  sum.indices.reserve(a.indices.size() + b.indices.size());
  sum.values.reserve(a.indices.size() + b.indices.size());
  std::size_t i = 0;
  std::size_t j = 0;
  while (i < a.indices.size() || j < b.indices.size()) {
    const bool from_a = j == b.indices.size() || (i < a.indices.size() && a.indices[i] <= b.indices[j]);
    const bool from_b = i == a.indices.size() || (j < b.indices.size() && b.indices[j] <= a.indices[i]);
    sum.indices.push_back(from_a ? a.indices[i] : b.indices[j]);
    sum.values.push_back(from_a && from_b ? a.values[i] + b.values[j] : from_a ? a.values[i] : b.values[j]);
    i += from_a;
    j += from_b;
  }
  return sum;
}

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
  Selection sum;
  for (const SparseTerm& term : terms) {
    visit_indices(term.indices, [&](const auto* index) {
      for (std::int64_t i = 1; i < term.indices.count; ++i) {
        require(index[i - 1] < index[i], "sparse indices must be ascending");
      }
      Selection next = weighted(index, term);
      sum = sum.indices.empty() ? std::move(next) : merged(sum, next);
    });
  }
  return sum;
}

}  // namespace freemerge
