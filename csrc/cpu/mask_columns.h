// A mask seen column by column, as the row-column transforms apply it: which columns of the half spectrum are
// one number, and the gains of the others. Every gain comes from mask.h; step-like masks are only evaluated
// near their steps.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "common/mask.h"
#include "cpu/kernels.h"

namespace freemerge {

// "Column" k: bins 0 <= k <= length / 2 along the axis that is transformed first (W, or H if transposed);
// each has one gain per bin of the other axis (`signals` bins).
template <typename T>
class MaskColumns {
 public:
  MaskColumns(const Mask& mask, bool transposed, const Kernels& kernels);

  std::int64_t length() const { return length_; }
  std::int64_t signals() const { return signals_; }

  // Bins s and signals - s have one gain, in every column.
  bool mirrored() const { return mirrored_; }
  // Gains given per column: signals / 2 + 1 if mirrored, else all of them.
  std::int64_t rows() const { return mirrored_ ? signals_ / 2 + 1 : signals_; }

  // The column's gain if it is one number.
  std::optional<double> constant(std::int64_t column) const {
    return constants_[static_cast<std::size_t>(column)];
  }

  // out[row * lanes + j] = factor * (gain of columns[j] - background), for 0 <= j < count <= lanes; the other
  // lanes are some finite number.
  void fill(const std::int32_t* columns, int count, int lanes, double background, double factor,
            T* out) const;

 private:
  void fill_smooth(const std::int32_t* columns, int count, int lanes, double background, double factor,
                   T* out) const;
  double gain(std::int64_t column, std::int64_t row) const;
  std::optional<double> find_constant(std::int64_t column) const;
  void find_steps();
  void find_official_steps();
  void tabulate();

  const Kernels* kernels_;
  Mask mask_;
  bool transposed_;
  std::int64_t length_, signals_;
  bool mirrored_;
  std::vector<std::optional<double>> constants_;  // of every column

  // kSteps: rows below inner_[k] lie inside edge0, rows below outer_[k] inside edge1.
  std::vector<std::int32_t> inner_, outer_;

  // kOfficial: distances along the other axis below disc[k] lie in the disc, those from ring_begin[k] to
  // ring_end[k] on the ring; one set for the bin itself and one for its mirror image.
  struct OfficialSteps {
    std::vector<std::int32_t> disc, ring_begin, ring_end;
  };
  OfficialSteps own_, mirror_;

  // Smooth kinds, in float arithmetic.
  std::optional<RadialTable> radial_;
  std::vector<float> row_squared_, column_squared_;
};

// Cached unless the mask is long, or a table, whose contents a key cannot tell.
template <typename T>
std::shared_ptr<const MaskColumns<T>> mask_columns_for(const Mask& mask, bool transposed,
                                                       const Kernels& kernels);

}  // namespace freemerge
