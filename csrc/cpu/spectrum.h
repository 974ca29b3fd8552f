// How a real matrix and its half spectrum lie in memory, for the row-column transforms (full and pruned
// forms).
//
// The matrix is `count` signals of `length` reals: its rows, or its columns when the plan is transposed.
// Signals are transformed in groups of 2 * lanes, as the real and imaginary parts of `lanes` complex signals.
//
// The spectrum keeps some of the bins 0 < k < length / 2 of every signal as complex columns, in blocks of
// `lanes` columns. The two bins that are real, DC and Nyquist, share one column, the edge: DC + i Nyquist; it
// comes last. With all bins that is exactly `length` reals per signal, so a spectrum fits where its matrix
// was. For odd lengths there is no Nyquist bin and the very last imaginary part is left out.
#pragma once

#include <cstdint>

#include "cpu/upcoming.h"

namespace freemerge {

template <typename Storage>
struct Signals {
  Storage* data;
  std::int64_t count;
  std::int64_t length;
  std::int64_t row_stride;  // of the matrix, in elements
  bool transposed;          // signals are columns: element e of signal s is data[e * row_stride + s]

  // `number` of them.
  Upcoming upcoming(std::int64_t first, std::int64_t number) const {
    if (transposed) return freemerge::upcoming(data + first, length, number, row_stride);
    return freemerge::upcoming(data + first * row_stride, number, length, row_stride);
  }
};

template <typename T>
struct Spectrum {
  T* data;
  std::int64_t signals;
  std::int64_t columns;  // complex columns, the edge included
  std::int64_t width;    // reals per signal: 2 * columns, or one less
  std::int64_t pitch;    // reals from one signal's memory to the next one's
  bool tiled;  // a group's blocks lie one after the other (column passes read that faster), not signal by
               // signal
  int lanes;
  // Padded slots (fft.h) of bins k and length - k for every column; for the edge, those of DC and Nyquist, or
  // -1 where the bin is not kept.
  const std::int32_t* low;
  const std::int32_t* high;
  bool edge;
  bool complete;  // every bin is kept

  std::int64_t group_size() const { return 2 * lanes; }
  std::int64_t groups() const { return (signals + group_size() - 1) / group_size(); }
  std::int64_t signals_in(std::int64_t group) const {
    const std::int64_t left = signals - group * group_size();
    return left < group_size() ? left : group_size();
  }
  std::int64_t blocks() const { return (columns + lanes - 1) / lanes; }
  std::int64_t columns_in(std::int64_t block) const {
    const std::int64_t left = columns - block * lanes;
    return left < lanes ? left : lanes;
  }
  // Reals per signal of a block: all real parts, then the imaginary parts.
  std::int64_t width_of(std::int64_t block) const {
    const std::int64_t left = width - block * 2 * lanes;
    return left < 2 * lanes ? left : 2 * lanes;
  }
  // Where block `block` of the group's first signal starts, and how far it is to the next signal's.
  T* at(std::int64_t group, std::int64_t block) const {
    const std::int64_t first = group * group_size();
    return data + first * pitch + block * 2 * lanes * (tiled ? signals_in(group) : 1);
  }
  std::int64_t step(std::int64_t block) const { return tiled ? width_of(block) : pitch; }

  Upcoming upcoming_group(std::int64_t group) const {
    const std::int64_t rows = signals_in(group);
    return tiled ? upcoming(at(group, 0), 1, rows * width, 0) : upcoming(at(group, 0), rows, width, pitch);
  }
  Upcoming upcoming_block(std::int64_t block) const {
    if (!tiled) return upcoming(at(0, block), signals, width_of(block), pitch);
    return upcoming(at(0, block), groups(), group_size() * width_of(block), group_size() * pitch);
  }
};

// Gains of one block of columns, in bin order along the signals.
template <typename T>
struct BlockGains {
  const T* gains;  // rows x lanes
  bool mirrored;   // bins k and n - k have one gain: only rows 0 .. n / 2 are given
  // For the edge column Z = D + i E with gains d and e: Z'(k) = (d + e) / 2 Z(k) + (d - e) / 2 conj(Z(-k)).
  // gains holds the first factor, this the second (n of them), or null where it is zero throughout.
  const T* edge_difference;
  T* edge_work;  // 2 n reals
};

}  // namespace freemerge
