// A smooth radial mask as a table of polynomials in the squared radius, for masks with many bins: mask.h
// costs a pow or an exp per bin, this a few multiplications.
//
// Cells have equal widths within each octave, so that a float's top bits are its cell and the rest its place
// in the cell.
#pragma once

#include <cstdint>
#include <vector>

#include "dtype.h"
#include "mask.h"

namespace freemerge {

class RadialTable {
 public:
  // For squared radii from `least` to `most`, least > 0. Gains are within 2e-8 of mask.h's, relative; where
  // that would take too many cells, usable() is false.
  RadialTable(const Mask& mask, double least, double most);

  bool usable() const { return usable_; }

  std::int32_t cell(float squared) const {
    return static_cast<std::int32_t>(float_bits(squared) >> shift_) - first_;
  }
  // Within the cell, from 0 to 1.
  float place(float squared) const {
    const std::uint32_t rest = float_bits(squared) & ((1u << shift_) - 1u);
    return static_cast<float>(static_cast<std::int32_t>(rest)) * scale_;
  }
  // Newton's form of the interpolating polynomial.
  float gain(std::int32_t cell, float place) const {
    const float* const c = &coefficients_[static_cast<std::size_t>(cell) * kNodes];
    float value = c[kNodes - 1];
    for (int i = kNodes - 2; i >= 0; --i) value = value * (place - node_[i]) + c[i];
    return value;
  }

 private:
  static constexpr int kNodes = 6;
  bool fit(const Mask& mask, double least, double most);

  bool usable_ = false;
  int shift_ = 0;
  float scale_ = 0;
  std::int32_t first_ = 0;
  float node_[kNodes] = {};
  std::vector<float> coefficients_;
};

}  // namespace freemerge
