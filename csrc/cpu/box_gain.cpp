#include "cpu/box_gain.h"

#include "cpu/features.h"

namespace freemerge {
namespace {

// The bin that is `offset` bins from the first at or above the centre of a box along an axis of `n` bins.
std::int64_t bin_at(std::int64_t offset, std::int64_t n, bool nyquist) {
  return ((nyquist ? (n + 1) / 2 : 0) + offset + n) % n;
}

// The mask less the background.
double correction_gain(const Plan& plan, std::int64_t a, std::int64_t k) {
  const Bin bin = stored_bin(plan.mask, bin_at(a, plan.mask.height, plan.rows.nyquist),
                             bin_at(k, plan.mask.width, plan.columns.nyquist));
  return mask_gain(plan.mask, bin.y, bin.x) - plan.background;
}

// Column k, rows gain.least() .. gain.band - 1 of it, as at most three steps in |a|, or false.
bool add_steps(const std::vector<float>& column, std::size_t k, BoxGain& gain) {
  const auto at = [&](std::int64_t a) { return column[static_cast<std::size_t>(a - gain.least())]; };
  int step = 0;
  for (auto& value : gain.value) value[k] = at(0);
  for (auto& bound : gain.bound) bound[k] = static_cast<std::int32_t>(gain.band);
  for (std::int64_t a = 0; a < gain.band; ++a) {
    if (at(a) != at(-a - gain.half_bin)) return false;
    if (at(a) == gain.value[step][k]) continue;
    if (step == 2) return false;
    gain.bound[step][k] = static_cast<std::int32_t>(a);
    gain.value[++step][k] = at(a);
  }
  return true;
}

}  // namespace

BoxGain make_box_gain(const Plan& plan, const Window& rows, const Window& columns) {
  const std::int64_t column_band = plan.columns.band;
  BoxGain gain;
  gain.band = plan.rows.band;
  gain.half_bin = half_bin(plan.rows, plan.mask.height);
  gain.pitch = (column_band + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  const auto pitch = static_cast<std::size_t>(gain.pitch);
  for (const double transform : rows.transform) {
    gain.row_factor.push_back(static_cast<float>(1.0 / (transform * transform)));
  }
  // One half comes from splitting the transforms of pairs of real rows.
  const double scale = 0.5 / (static_cast<double>(plan.mask.height) * static_cast<double>(plan.mask.width));
  gain.column_factor.resize(pitch);
  for (std::size_t k = 0; k < columns.transform.size(); ++k) {
    gain.column_factor[k] = static_cast<float>(scale / (columns.transform[k] * columns.transform[k]));
  }
  for (auto& value : gain.value) value.resize(pitch);
  for (auto& bound : gain.bound) bound.resize(pitch);

  const auto height = static_cast<std::size_t>(gain.band - gain.least());
  std::vector<float> column(height);
  bool steps = true;
  for (std::int64_t k = 0; k < column_band; ++k) {
    for (std::int64_t a = gain.least(); a < gain.band; ++a) {
      column[static_cast<std::size_t>(a - gain.least())] = static_cast<float>(correction_gain(plan, a, k));
    }
    const auto index = static_cast<std::size_t>(k);
    if (steps && add_steps(column, index, gain)) continue;
    if (steps) {  // start over, as a table
      steps = false;
      gain.table.resize(height * pitch);
      k = -1;
      continue;
    }
    for (std::size_t a = 0; a < height; ++a) gain.table[a * pitch + index] = column[a];
  }
  return gain;
}

}  // namespace freemerge
