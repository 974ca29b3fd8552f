// A mask column by column, as the full form applies it. Every gain comes from mask.h; step-like masks are
// only evaluated near their steps.
#pragma once

#include <cstdint>
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
  // Copies the mask's table.
  MaskColumns(const Mask& mask, bool transposed, const Kernels& kernels);

  std::int64_t length() const { return length_; }
  std::int64_t signals() const { return signals_; }

  // Bins s and signals - s have one gain, in every column.
  bool mirrored() const { return mirrored_; }
  // Gains given per column: signals / 2 + 1 if mirrored, else all of them.
  std::int64_t rows() const { return mirrored_ ? signals_ / 2 + 1 : signals_; }

  // out[row * lanes + j] = factor * (gain of columns[j] - background), for 0 <= j < count <= lanes; the other
  // lanes are some finite number.
  void fill(const std::int32_t* columns, int count, int lanes, double background, double factor,
            T* out) const;

  std::int64_t nbytes() const;

 private:
  // Of each column: distances along the other axis below disc lie in the disc, those from ring_begin to
  // ring_end on the ring.
  struct OfficialSteps {
    std::vector<std::int32_t> disc, ring_begin, ring_end;
  };

  double gain(const Mask& mask, std::int64_t column, std::int64_t row) const;
  void fill_smooth(const std::int32_t* columns, int count, int lanes, double background, double factor,
                   T* out) const;
  void find_steps();
  void find_official_steps();
  void tabulate();

  const Kernels* kernels_;
  std::vector<float> table_;
  Mask mask_;
  bool transposed_;
  std::int64_t length_, signals_;
  bool mirrored_;

  // kSteps: rows below inner_[k] lie inside edge0, rows below outer_[k] inside edge1.
  std::vector<std::int32_t> inner_, outer_;

  // kOfficial: one set for the bin itself and one for its mirror image.
  OfficialSteps own_, mirror_;

  // Smooth masks, in float arithmetic.
  std::optional<RadialTable> radial_;
  std::vector<float> row_squared_, column_squared_;
};

}  // namespace freemerge
