#include "cpu/radial_table.h"

#include <algorithm>
#include <cmath>

#include "common/dtype.h"

namespace freemerge {
namespace {

constexpr int kNodes = RadialCells::kNodes;

}  // namespace

RadialTable::RadialTable(const Mask& mask, double least, double most) {
  constexpr double kPi = 3.14159265358979323846;
  for (int i = 0; i < kNodes; ++i) {
    node_[i] = static_cast<float>(0.5 - 0.5 * std::cos(kPi * (i + 0.5) / kNodes));
  }
  for (int cells_per_octave_log2 = 3; cells_per_octave_log2 <= 7 && !usable_; ++cells_per_octave_log2) {
    shift_ = 23 - cells_per_octave_log2;
    usable_ = fit(mask, least, most);
  }
}

RadialCells RadialTable::cells() const {
  RadialCells cells{shift_, first_, {}, coefficients_.data()};
  std::copy_n(node_, kNodes, cells.node);
  return cells;
}

bool RadialTable::fit(const Mask& mask, double least, double most) {
  constexpr double kTolerance = 2e-8;
  const SmoothMask smooth(mask);
  coefficients_.clear();
  first_ = static_cast<std::int32_t>(float_bits(static_cast<float>(least)) >> shift_);
  const auto last = static_cast<std::int32_t>(float_bits(static_cast<float>(most)) >> shift_);
  for (std::int32_t cell = first_; cell <= last; ++cell) {
    const double begin = static_cast<double>(float_from_bits(static_cast<std::uint32_t>(cell) << shift_));
    const double end = static_cast<double>(float_from_bits(static_cast<std::uint32_t>(cell + 1) << shift_));
    const auto at = [&](double fraction) { return smooth.gain<double>(begin + (end - begin) * fraction); };
    double difference[kNodes];  // divided differences
    for (int i = 0; i < kNodes; ++i) difference[i] = at(static_cast<double>(node_[i]));
    for (int order = 1; order < kNodes; ++order) {
      for (int i = kNodes - 1; i >= order; --i) {
        const double gap = static_cast<double>(node_[i]) - static_cast<double>(node_[i - order]);
        difference[i] = (difference[i] - difference[i - 1]) / gap;
      }
    }
    for (const double d : difference) coefficients_.push_back(static_cast<float>(d));
    // Midway between nodes the error is about largest.
    for (const double fraction : {0.0, 0.5}) {
      double value = difference[kNodes - 1];
      for (int i = kNodes - 2; i >= 0; --i) {
        value = value * (fraction - static_cast<double>(node_[i])) + difference[i];
      }
      const double exact = at(fraction);
      if (!(std::abs(value - exact) <= kTolerance * std::abs(exact))) return false;
    }
  }
  return true;
}

}  // namespace freemerge
