// A smooth radial mask as a table of polynomials in the squared radius, for masks with many bins: mask.h
// costs a pow or an exp per bin, this a few multiplications.
//
// Cells have equal widths within each octave, so that a float's top bits are its cell and the rest its
// fraction in the cell.
#pragma once

#include <cstdint>
#include <vector>

#include "common/bytes.h"
#include "common/mask.h"

namespace freemerge {

// Plain data, as the kernel takes it (radial.inl).
struct RadialCells {
  static constexpr int kNodes = 6;
  int shift;                  // bits of a float below its cell number
  std::int32_t first;         // number of the first cell
  float node[kNodes];         // within a cell, from 0 to 1
  const float* coefficients;  // per cell, of Newton's form of the interpolating polynomial
};

class RadialTable {
 public:
  // For squared radii from `least` to `most`, least > 0. Gains are within 2e-8 of mask.h's, relative; where
  // that would take too many cells, usable() is false.
  RadialTable(const Mask& mask, double least, double most);

  bool usable() const { return usable_; }
  RadialCells cells() const;
  std::int64_t nbytes() const { return vector_bytes(coefficients_); }

 private:
  bool fit(const Mask& mask, double least, double most);

  bool usable_ = false;
  int shift_ = 0;
  std::int32_t first_ = 0;
  float node_[RadialCells::kNodes] = {};
  std::vector<float> coefficients_;
};

}  // namespace freemerge
