// A split transform there and back with a gain for every bin in between, compiled once per instruction set.
#pragma once

#include "cpu/fft.inl"
#include "cpu/upcoming.h"

namespace freemerge::FREEMERGE_ISA {

// Fft::padded_size, compiled for this instruction set.
template <typename T>
FM_INLINE std::int64_t padded_size(const Fft<T>& plan) {
  return plan.method == Fft<T>::Method::kSplit ? plan.columns->n * plan.row_pitch : plan.n;
}

// One of `parts` parts of what is read next.
FM_INLINE void prefetch_part(const Upcoming& next, std::int64_t part, std::int64_t parts) {
  constexpr std::int64_t kLine = 64;
  const std::int64_t lines = (next.bytes + kLine - 1) / kLine, total = next.rows * lines;
  const std::int64_t end = total * (part + 1) / parts;
  for (std::int64_t line = total * part / parts; line < end;) {
    const std::int64_t row = line / lines, first = row * lines, stop = smaller(end, first + lines);
    const std::uintptr_t start = next.data + static_cast<std::uintptr_t>(row * next.stride);
    for (; line < stop; ++line) {
      prefetch_l2(reinterpret_cast<const void*>(start + static_cast<std::uintptr_t>((line - first) * kLine)));
    }
  }
}

template <typename T>
FM_INLINE void multiply(T* element, Vec<T> gain) {
  store(element, load(element) * gain);
  store(element + kLanes<T>, load(element + kLanes<T>) * gain);
}

// Row by row of a padded batch, between forward_columns and inverse_columns; gain(bin) is a vector, one
// number for each lane. What is read next comes into cache meanwhile.
template <typename T, typename Gain>
FM_INLINE void filter_split_rows(const Fft<T>& plan, T* batch, T* work, Gain gain, Upcoming next) {
  const std::int64_t width = plan.rows->n, length = plan.columns->n;
  for (std::int64_t k2 = 0; k2 < length; ++k2) {
    prefetch_part(next, k2, length);
    T* const row = batch + k2 * plan.row_pitch * kElement<T>;
    split_rows(plan, row, 0, 1, work, kForward<T>);
    for (std::int64_t k1 = 0; k1 < width; ++k1) {
      multiply(row + k1 * kElement<T>, gain(k2 + length * k1));
    }
    split_rows(plan, row, 0, 1, work, kInverse<T>);
  }
}

}  // namespace freemerge::FREEMERGE_ISA
