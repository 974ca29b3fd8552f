// Plans of transforms of one complex line at a time, whose elements fill the SIMD lanes (line_fft.inl). A
// batch of `lanes` lines (fft.h) leaves the first-level cache long before one line does, and must be
// transposed on its way in and on its way out; a line is transposed once, between the two steps of its
// transform:
//
//   n = lanes * columns.n. Element lanes * m + l is in lane l of vector m. The columns over m are a batch of
//   `lanes` transforms; bins k2 + columns.n * k1 come from a transform over the lanes, whose inputs are
//   vectors of `lanes` neighbouring k2 after the transposition, and so are its outputs: natural order.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/fft.h"

namespace freemerge {

template <typename T>
class LineFft {
 public:
  // Null where lines of n are not made for it: n is no multiple of `lanes`, less than its square or than nine
  // vectors, has a large prime factor, or is so long that a line leaves the second-level cache.
  static std::shared_ptr<const LineFft> make(std::int64_t n, int lanes);

  std::int64_t n;
  Fft<T> columns;
  // For each group of `lanes` bins k2 and each lane but the first: exp(-2 pi i lane * k2 / n), cosines of the
  // group, then its sines. Where columns.n is no multiple of `lanes`, the last group overlaps the one before.
  const T* twiddles;
  const T* roots;  // exp(2 pi i j / lanes), pairs (cos, sin)
  // Reals of space that its bins take, which the columns work in.
  std::int64_t bins_size;

  // Reals of scratch space for the rows of a group: a line, its bins, one block of columns and, if the
  // spectrum goes into the rows' own memory, the group's spectrum.
  std::int64_t work(bool packed) const;
  std::int64_t nbytes() const;

 private:
  LineFft(std::int64_t length, int lanes, Fft<T> column_fft);

  int lanes_;
  std::vector<T> twiddle_storage_, root_storage_;
};

}  // namespace freemerge
