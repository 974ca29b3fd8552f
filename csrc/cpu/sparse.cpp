#include "cpu/sparse.h"

#include <algorithm>

#include "error.h"
#include "parallel.h"

namespace freemerge {
namespace {

constexpr std::int64_t kBlock = 1 << 14;     // entries per task
constexpr std::int64_t kPrefetchAhead = 32;  // entries; each is a cache miss of its own

template <typename Visit>
void visit_indices(const Indices& indices, const Visit& visit) {
  if (indices.wide) {
    visit(static_cast<const std::int64_t*>(indices.data));
  } else {
    visit(static_cast<const std::int32_t*>(indices.data));
  }
}

template <typename Index>
void check_range(const Index* index, std::int64_t count, std::int64_t n) {
  Index least = 0;
  Index most = -1;
  for (std::int64_t i = 0; i < count; ++i) {
    least = std::min(least, index[i]);
    most = std::max(most, index[i]);
  }
  require(least >= 0 && most < n, "a sparse index lies outside the tensor");
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

// visit(i) for every entry, with the weight it concerns on its way to the cache.
template <typename T, typename Index, typename Visit>
void for_each_entry(T* weights, const Index* index, std::int64_t count, int threads, const Visit& visit) {
  parallel_for((count + kBlock - 1) / kBlock, threads, [&](std::int64_t block, int) {
    const std::int64_t end = std::min(count, (block + 1) * kBlock);
    for (std::int64_t i = block * kBlock; i < end; ++i) {
      __builtin_prefetch(weights + index[std::min(i + kPrefetchAhead, end - 1)], 1);
      visit(i);
    }
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

void sparse_apply(void* weights, DType dtype, std::int64_t n, Indices indices, const float* values,
                  double scale, const void* origin, void* saved, int threads) {
  visit_indices(indices, [&](const auto* index) {
    check_range(index, indices.count, n);
    visit_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* w = static_cast<T*>(weights);
      T* old = static_cast<T*>(saved);
      const T* from = static_cast<const T*>(origin);
      for_each_entry(w, index, indices.count, threads, [=](std::int64_t i) {
        old[i] = w[index[i]];
        w[index[i]] = round_sum(from == nullptr ? old[i] : from[i], scale, values[i]);
      });
    });
  });
}

void sparse_restore(void* weights, DType dtype, std::int64_t n, Indices indices, const void* saved,
                    int threads) {
  visit_indices(indices, [&](const auto* index) {
    check_range(index, indices.count, n);
    visit_dtype(dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      T* w = static_cast<T*>(weights);
      const T* old = static_cast<const T*>(saved);
      for_each_entry(w, index, indices.count, threads, [=](std::int64_t i) { w[index[i]] = old[i]; });
    });
  });
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
