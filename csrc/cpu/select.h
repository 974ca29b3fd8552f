// The entries of largest magnitude of a task vector v = model - base, exactly.
//
// Magnitudes are ordered by the bits of |v| in float32 (double differences are rounded to float first); equal
// ones by index, lowest first. Zeros are never selected. A NaN or infinity counts as largest, so it is always
// in a non-empty selection, where the caller can see it.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/accumulate.h"

namespace freemerge {

struct TaskVector {
  Storage model;
  Storage base;  // data is null: the entries of `model` themselves
};

struct Selection {
  std::vector<std::int64_t> indices;  // ascending
  std::vector<float> values;          // v at those indices
};

// Of the 31 bits of |v| in float32 the last `shift` do not count, the next `bits` are the bin, and the others
// must be `above`.
struct MagnitudeBins {
  int shift;
  int bits;
  std::uint32_t above;
};

// Magnitudes that share the leading 15 bits of |v| share a bin.
inline constexpr MagnitudeBins kLeadingBits{16, 15, 0};

// The min(k, number of non-zeros) largest of n entries.
Selection select_largest(TaskVector v, std::int64_t n, std::int64_t k, int threads);

// The same in each of `rows` rows of `width` entries; indices count through the whole matrix.
Selection select_largest_per_row(TaskVector v, std::int64_t rows, std::int64_t width, std::int64_t k,
                                 int threads);

// Adds the number of entries in each bin to counts[1 << bins.bits].
void count_magnitudes(TaskVector v, std::int64_t n, MagnitudeBins bins, std::int64_t* counts, int threads);

// All entries whose magnitude lies in bin `lowest` of kLeadingBits or above it, zeros excepted.
Selection select_from_bin(TaskVector v, std::int64_t n, int lowest, int threads);

}  // namespace freemerge
