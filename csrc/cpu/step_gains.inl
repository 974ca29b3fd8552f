// Gains of masks that are steps along a column, compiled once per instruction set. See mask_columns.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace freemerge::FREEMERGE_ISA {

// Row numbers, as wide as the gains they stand beside.
template <typename T>
struct RowOf {
  using type = std::int32_t;
};
template <>
struct RowOf<double> {
  using type = std::int64_t;
};
template <typename T>
using Rows = Vec<typename RowOf<T>::type>;

template <typename T>
FM_INLINE Rows<T> load_rows(const std::int32_t* rows) {
  Rows<T> v{};
  for (int j = 0; j < kLanes<T>; ++j) v[j] = rows[j];
  return v;
}

// out[row * lanes + j] = gains[0] below inner[j], else gains[1] below outer[j], else gains[2].
template <typename T>
void step_gains(const std::int32_t* inner, const std::int32_t* outer, const T* gains, std::int64_t rows,
                T* out) {
  const Rows<T> first = load_rows<T>(inner), second = load_rows<T>(outer);
  const Rows<T> a = bit_cast<Rows<T>>(broadcast(gains[0])), b = bit_cast<Rows<T>>(broadcast(gains[1])),
                c = bit_cast<Rows<T>>(broadcast(gains[2]));
  Rows<T> row{};
  for (std::int64_t i = 0; i < rows; ++i, row += 1, out += kLanes<T>) {
    const Rows<T> in_first = row < first, in_second = row < second;
    store(out, bit_cast<Vec<T>>(select(in_first, a, select(in_second, b, c))));
  }
}

// The released code's mask with its mirror image: each disc and each ring that a bin lies in counts `factor`.
// A row's distance is to the middle row, its mirror image's to the same.
template <typename T>
void official_gains(const OfficialLanes& own, const OfficialLanes& mirror, std::int64_t signals,
                    std::int64_t rows, T factor, T offset, T* out) {
  const OfficialLanes* const lanes[2] = {&own, &mirror};
  Rows<T> disc[2], ring_begin[2], ring_end[2];
  for (int i = 0; i < 2; ++i) {
    disc[i] = load_rows<T>(lanes[i]->disc);
    ring_begin[i] = load_rows<T>(lanes[i]->ring_begin);
    ring_end[i] = load_rows<T>(lanes[i]->ring_end);
  }
  const std::int64_t middle = signals / 2;
  for (std::int64_t row = 0; row < rows; ++row, out += kLanes<T>) {
    const std::int64_t places[2] = {row, row == 0 ? 0 : signals - row};
    Rows<T> minus_hits{};
    for (int i = 0; i < 2; ++i) {
      const std::int64_t offset_of_row = places[i] - middle;
      const Rows<T> distance = Rows<T>{} + static_cast<typename RowOf<T>::type>(
                                               offset_of_row < 0 ? -offset_of_row : offset_of_row);
      minus_hits += (distance < disc[i]) + (distance < ring_end[i]) - (distance < ring_begin[i]);
    }
    store(out, __builtin_convertvector(minus_hits, Vec<T>) * -factor - offset);
  }
}

}  // namespace freemerge::FREEMERGE_ISA
