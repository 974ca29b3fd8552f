#include "cpu/select.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>

#include "common/error.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace freemerge {
namespace {

constexpr std::int64_t kBlock = 1 << 14;  // entries per task
constexpr std::int64_t kCountBlock = 1 << 18;
constexpr std::int64_t kRowBlock = 1 << 20;  // the same by rows, whose first has no predecessor to learn from
constexpr std::int64_t kSample = 1 << 15;    // entries looked at to guess a threshold
constexpr std::int64_t kGuessFrom = 4 * kSample;
constexpr std::int64_t kCountFrom = 1 << 13;  // below, sorting out all entries is cheaper than a histogram
constexpr float kRowSlack = 0.85f;            // of one row's least magnitude, to start the next row from
constexpr std::int64_t kSlackInSigmas = 5;  // a guess fails, and costs a second pass, about once in a million

// What a kernel finds in a range. Left uninitialised: clearing it would cost as much as finding.
struct Hits {
  std::unique_ptr<std::uint32_t[]> offsets;
  std::unique_ptr<float[]> values;

  explicit Hits(std::int64_t capacity)
      : offsets(new std::uint32_t[static_cast<std::size_t>(capacity)]),
        values(new float[static_cast<std::size_t>(capacity)]) {}
};

void append(Selection& selection, std::int64_t begin, const Hits& hits, std::int64_t found) {
  const std::size_t size = selection.indices.size();
  selection.indices.resize(size + static_cast<std::size_t>(found));
  for (std::int64_t i = 0; i < found; ++i) {
    selection.indices[size + static_cast<std::size_t>(i)] = begin + hits.offsets[static_cast<std::size_t>(i)];
  }
  selection.values.insert(selection.values.end(), hits.values.get(), hits.values.get() + found);
}

std::uint32_t magnitude(float value) { return float_bits(value) & 0x7fffffffu; }

// The k-th largest of the magnitudes, 1 <= k <= their number; reorders them.
std::uint32_t kth_largest(std::vector<std::uint32_t>& magnitudes, std::int64_t k) {
  const auto kth = magnitudes.begin() + (k - 1);
  std::nth_element(magnitudes.begin(), kth, magnitudes.end(), std::greater<std::uint32_t>());
  return *kth;
}

// Keeps the k largest of an ascending selection, in place.
void keep_largest(Selection& selection, std::int64_t k) {
  const auto size = static_cast<std::int64_t>(selection.values.size());
  if (size <= k) return;
  std::vector<std::uint32_t> magnitudes(selection.values.size());
  std::transform(selection.values.begin(), selection.values.end(), magnitudes.begin(), magnitude);
  const std::uint32_t kth = k == 0 ? 0xffffffffu : kth_largest(magnitudes, k);
  std::int64_t ties = k;
  for (const float value : selection.values) ties -= magnitude(value) > kth;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < selection.values.size(); ++i) {
    const std::uint32_t m = magnitude(selection.values[i]);
    if (m < kth || (m == kth && ties-- <= 0)) continue;
    selection.indices[kept] = selection.indices[i];
    selection.values[kept] = selection.values[i];
    ++kept;
  }
  selection.indices.resize(kept);
  selection.values.resize(kept);
}

float least_magnitude(const Selection& selection) {
  float least = std::fabs(selection.values.front());
  for (const float value : selection.values) least = std::min(least, std::fabs(value));
  return least;
}

Selection concatenate(const std::vector<Selection>& parts) {
  std::size_t size = 0;
  for (const Selection& part : parts) size += part.values.size();
  Selection all;
  all.indices.reserve(size);
  all.values.reserve(size);
  for (const Selection& part : parts) {
    all.indices.insert(all.indices.end(), part.indices.begin(), part.indices.end());
    all.values.insert(all.values.end(), part.values.begin(), part.values.end());
  }
  return all;
}

Selection collect(TaskVector v, std::int64_t n, std::uint32_t threshold, int threads) {
  const auto kernel = active_kernels().collect_range;
  std::vector<Selection> parts(static_cast<std::size_t>(blocks_in(n, kBlock)));
  for_blocks(n, kBlock, threads, [&](std::int64_t block, std::int64_t begin, std::int64_t count) {
    const Hits hits(count);
    const std::int64_t found = kernel(v, begin, count, threshold, hits.offsets.get(), hits.values.get());
    Selection& part = parts[static_cast<std::size_t>(block)];
    append(part, begin, hits, found);
  });
  return concatenate(parts);
}

std::uint32_t magnitude_at(const TaskVector& v, std::int64_t index) {
  const auto read = [index](Storage source) {
    return visit_dtype(source.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      return static_cast<double>(to_float(static_cast<const T*>(source.data)[index]));
    });
  };
  const double base = v.base.data == nullptr ? 0.0 : read(v.base);
  return magnitude(static_cast<float>(read(v.model) - base));
}

// A threshold that about k entries, and some slack, reach: the order statistic of a sample. One entry is
// taken from each of kSample equal stretches, at an irregular place so that no column of a matrix is
// favoured.
std::uint32_t guess_threshold(const TaskVector& v, std::int64_t n, std::int64_t k) {
  const std::int64_t stretch = n / kSample;
  std::vector<std::uint32_t> sample(static_cast<std::size_t>(kSample));
  for (std::int64_t i = 0; i < kSample; ++i) {
    const std::uint64_t scrambled = static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u >> 33;
    sample[static_cast<std::size_t>(i)] =
        magnitude_at(v, i * stretch + static_cast<std::int64_t>(scrambled) % stretch);
  }
  const double expected = static_cast<double>(k) / static_cast<double>(n) * static_cast<double>(kSample);
  const auto rank =
      static_cast<std::int64_t>(expected + kSlackInSigmas * std::sqrt(expected) + kSlackInSigmas);
  return rank >= kSample ? 1 : std::max(1u, kth_largest(sample, rank));
}

// The lower edge of the bin that holds the k-th largest entry, or 1 where fewer than k are not zero.
std::uint32_t exact_bin_edge(TaskVector v, std::int64_t n, std::int64_t k, int threads) {
  std::vector<std::int64_t> counts(std::size_t{1} << kLeadingBits.bits);
  count_magnitudes(v, n, kLeadingBits, counts.data(), threads);
  std::int64_t seen = 0;
  for (std::size_t bin = counts.size() - 1; bin > 0; --bin) {
    seen += counts[bin];
    if (seen >= k) return static_cast<std::uint32_t>(bin) << kLeadingBits.shift;
  }
  return 1;
}

}  // namespace

Selection select_largest(TaskVector v, std::int64_t n, std::int64_t k, int threads) {
  require(n >= 0 && k >= 0, "n and k must not be negative");
  if (k == 0) return {};
  const bool guessed = k < n && n >= kGuessFrom;
  std::uint32_t threshold = 1;
  if (guessed) {
    threshold = guess_threshold(v, n, k);
  } else if (k < n && n >= kCountFrom) {
    threshold = exact_bin_edge(v, n, k, threads);
  }
  Selection selection = collect(v, n, threshold, threads);
  if (guessed && static_cast<std::int64_t>(selection.values.size()) < k) {
    selection = collect(v, n, exact_bin_edge(v, n, k, threads), threads);
  }
  keep_largest(selection, k);
  return selection;
}

Selection select_largest_per_row(TaskVector v, std::int64_t rows, std::int64_t width, std::int64_t k,
                                 int threads) {
  require(rows >= 0 && width >= 0 && k >= 0, "rows, width and k must not be negative");
  require(width <= 0xffffffff, "a row is too long");
  if (k == 0 || rows == 0 || width == 0) return {};
  const auto kernel = active_kernels().collect_range;
  const std::int64_t rows_per_task = std::max<std::int64_t>(1, kRowBlock / width);
  std::vector<Selection> parts(static_cast<std::size_t>(blocks_in(rows, rows_per_task)));
  parallel_for(static_cast<std::int64_t>(parts.size()), threads, [&](std::int64_t task, int) {
    const Hits hits(width);
    Selection candidates;
    std::uint32_t threshold =
        1;  // rows resemble each other: start from a little less than the last row needed
    Selection& part = parts[static_cast<std::size_t>(task)];
    for (std::int64_t row = task * rows_per_task; row < std::min(rows, (task + 1) * rows_per_task); ++row) {
      const auto collect_row = [&] {
        return kernel(v, row * width, width, threshold, hits.offsets.get(), hits.values.get());
      };
      std::int64_t found = collect_row();
      if (found < k && threshold > 1) {
        threshold = 1;
        found = collect_row();
      }
      candidates.indices.clear();
      candidates.values.clear();
      append(candidates, row * width, hits, found);
      keep_largest(candidates, k);
      threshold = found < k ? 1 : std::max(1u, magnitude(kRowSlack * least_magnitude(candidates)));
      part.indices.insert(part.indices.end(), candidates.indices.begin(), candidates.indices.end());
      part.values.insert(part.values.end(), candidates.values.begin(), candidates.values.end());
    }
  });
  return concatenate(parts);
}

void count_magnitudes(TaskVector v, std::int64_t n, MagnitudeBins bins, std::int64_t* counts, int threads) {
  require(n >= 0, "n must not be negative");
  require(bins.shift >= 0 && bins.bits >= 0 && bins.shift + bins.bits <= 31, "a magnitude has 31 bits");
  const auto kernel = active_kernels().count_range;
  const std::size_t size = std::size_t{1} << bins.bits;
  // 32-bit counters stay in cache; a stretch of 2^31 entries cannot overflow one.
  constexpr std::int64_t kStretch = std::int64_t{1} << 31;
  for (std::int64_t first = 0; first < n; first += kStretch) {
    const std::int64_t end = std::min(n, first + kStretch);
    const std::int64_t blocks = blocks_in(end - first, kCountBlock);
    std::vector<std::vector<std::uint32_t>> parts(static_cast<std::size_t>(workers_for(blocks, threads)));
    parallel_for(blocks, threads, [&](std::int64_t block, int worker) {
      std::vector<std::uint32_t>& part = parts[static_cast<std::size_t>(worker)];
      part.resize(size);
      const std::int64_t begin = first + block * kCountBlock;
      kernel(v, begin, std::min(kCountBlock, end - begin), bins, part.data());
    });
    for (const auto& part : parts) {
      for (std::size_t bin = 0; bin < part.size(); ++bin) counts[bin] += part[bin];
    }
  }
}

Selection select_from_bin(TaskVector v, std::int64_t n, int lowest, int threads) {
  require(n >= 0, "n must not be negative");
  require(lowest >= 0 && lowest < 1 << kLeadingBits.bits, "lowest must be a bin");
  return collect(v, n, std::max(1u, static_cast<std::uint32_t>(lowest) << kLeadingBits.shift), threads);
}

}  // namespace freemerge
