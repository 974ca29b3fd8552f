#include "cpu/mask_columns.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "common/bytes.h"

namespace freemerge {
namespace {

// Smaller masks are evaluated bin by bin: a table would cost more.
constexpr std::int64_t kLeastBinsForTable = 1 << 14;

// The number of rows 0 <= row < limit with inside(row), which holds up to some row and not from there on. The
// search starts at the neighbouring column's answer, which is close.
template <typename Inside>
std::int32_t settle(std::int32_t start, std::int64_t limit, const Inside& inside) {
  std::int32_t count = start;
  while (count > 0 && !inside(count - 1)) --count;
  while (count < limit && inside(count)) ++count;
  return count;
}

}  // namespace

template <typename T>
MaskColumns<T>::MaskColumns(const Mask& mask, bool transposed, const Kernels& kernels)
    : kernels_(&kernels),
      mask_(mask),
      transposed_(transposed),
      length_(transposed ? mask.height : mask.width),
      signals_(transposed ? mask.width : mask.height) {
  const bool both_odd = length_ % 2 == 1 && signals_ % 2 == 1;
  mirrored_ = mask.kind != MaskKind::kTable && !(mask.kind == MaskKind::kOfficial && both_odd);
  if (mask.table != nullptr) {
    table_.assign(mask.table, mask.table + mask.height * (mask.width / 2 + 1));
    mask_.table = table_.data();
  }
  if (mask.kind == MaskKind::kSteps) find_steps();
  if (mask.kind == MaskKind::kOfficial) find_official_steps();
  if (is_smooth(mask.kind) && std::is_same_v<T, float> && length_ * signals_ >= kLeastBinsForTable)
    tabulate();
}

template <typename T>
double MaskColumns<T>::gain(const Mask& mask, std::int64_t column, std::int64_t row) const {
  if (!transposed_) return mask_gain(mask, row, column);
  const Bin bin = stored_bin(mask, column, row);
  return mask_gain(mask, bin.y, bin.x);
}

template <typename T>
void MaskColumns<T>::find_steps() {
  // Number the three zones: the radius, and so the zone, never falls from one row to the next.
  Mask zones = mask_;
  zones.gain0 = 0;
  zones.gain1 = 1;
  zones.gain2 = 2;
  std::int32_t inner = 0, outer = 0;
  for (std::int64_t column = 0; column <= length_ / 2; ++column) {
    inner = settle(inner, rows(), [&](std::int64_t row) { return gain(zones, column, row) < 1; });
    outer = settle(outer, rows(), [&](std::int64_t row) { return gain(zones, column, row) < 2; });
    inner_.push_back(inner);
    outer_.push_back(outer);
  }
}

template <typename T>
void MaskColumns<T>::find_official_steps() {
  constexpr double kNone = -1;
  const auto count_within = [&](std::int64_t column, double radius, std::int32_t start) {
    Mask disc = mask_;
    disc.edge0 = radius;
    disc.edge1 = kNone;
    return settle(start, signals_, [&](std::int64_t distance) {
      const std::int64_t row = signals_ / 2 + distance;
      return (transposed_ ? official_gain(disc, column, row) : official_gain(disc, row, column)) != 0;
    });
  };
  const float ring = static_cast<float>(mask_.edge1);
  const double below_ring = std::nextafter(ring, -std::numeric_limits<float>::infinity());
  for (OfficialSteps* steps : {&own_, &mirror_}) {
    std::int32_t disc = 0, ring_begin = 0, ring_end = 0;
    for (std::int64_t column = 0; column <= length_ / 2; ++column) {
      const std::int64_t bin = steps == &own_ || column == 0 ? column : length_ - column;
      disc = count_within(bin, mask_.edge0, disc);
      ring_begin = count_within(bin, below_ring, ring_begin);
      ring_end = count_within(bin, ring, ring_end);
      steps->disc.push_back(disc);
      steps->ring_begin.push_back(ring_begin);
      steps->ring_end.push_back(ring_end);
    }
  }
}

template <typename T>
void MaskColumns<T>::tabulate() {
  const double row_unit = transposed_ ? mask_.unit_x : mask_.unit_y;
  const double column_unit = transposed_ ? mask_.unit_y : mask_.unit_x;
  const auto squares = [](double unit, std::int64_t count) {
    std::vector<float> squared;
    for (std::int64_t i = 0; i < count; ++i) {
      const double frequency = unit * static_cast<double>(i);
      squared.push_back(static_cast<float>(frequency * frequency));
    }
    return squared;
  };
  row_squared_ = squares(row_unit, rows());
  column_squared_ = squares(column_unit, length_ / 2 + 1);
  const double unit = std::min(row_unit, column_unit);
  radial_.emplace(mask_, 0.5 * unit * unit, 1.001 * (row_squared_.back() + column_squared_.back()));
  if (!radial_->usable()) radial_.reset();
}

template <typename T>
void MaskColumns<T>::fill_smooth(const std::int32_t* columns, int count, int lanes, double background,
                                 double factor, T* out) const {
  if constexpr (std::is_same_v<T, float>) {
    float column_squared[kMaxLanes];
    for (int j = 0; j < lanes; ++j) {
      column_squared[j] = column_squared_[static_cast<std::size_t>(columns[std::min(j, count - 1)])];
    }
    kernels_->radial_gains(radial_->cells(), column_squared, row_squared_.data(), rows(),
                           static_cast<float>(factor), static_cast<float>(factor * background), out);
    for (int j = 0; j < count; ++j) {  // the table begins beyond the origin
      if (columns[j] == 0) out[j] = static_cast<float>(factor * (gain(mask_, 0, 0) - background));
    }
  }
}

template <typename T>
void MaskColumns<T>::fill(const std::int32_t* columns, int count, int lanes, double background, double factor,
                          T* out) const {
  const auto value = [&](double g) { return static_cast<T>(factor * (g - background)); };
  if (mask_.kind == MaskKind::kSteps) {
    std::int32_t inner[kMaxLanes] = {}, outer[kMaxLanes] = {};
    for (int j = 0; j < count; ++j) {
      inner[j] = inner_[static_cast<std::size_t>(columns[j])];
      outer[j] = outer_[static_cast<std::size_t>(columns[j])];
    }
    const T gains[3] = {value(mask_.gain0), value(mask_.gain1), value(mask_.gain2)};
    return transform_kernels(*kernels_, T{}).step_gains(inner, outer, gains, rows(), out);
  }
  if (mask_.kind == MaskKind::kOfficial) {
    OfficialLanes own, mirror;
    const auto gather = [&](const OfficialSteps& steps, OfficialLanes& into) {
      for (int j = 0; j < count; ++j) {
        const auto column = static_cast<std::size_t>(columns[j]);
        into.disc[j] = steps.disc[column];
        into.ring_begin[j] = steps.ring_begin[column];
        into.ring_end[j] = steps.ring_end[column];
      }
    };
    gather(own_, own);
    gather(mirror_, mirror);
    return transform_kernels(*kernels_, T{})
        .official_gains(own, mirror, signals_, rows(), static_cast<T>(0.5 * factor),
                        static_cast<T>(factor * background), out);
  }
  if (radial_) return fill_smooth(columns, count, lanes, background, factor, out);
  if (mask_.kind == MaskKind::kTable && !transposed_) {
    const std::int64_t pitch = mask_.width / 2 + 1, first = columns[0];
    const bool adjacent = columns[count - 1] - first == count - 1;  // they ascend
    for (std::int64_t row = 0; row < rows(); ++row, out += lanes) {
      const float* const gains = table_.data() + row * pitch;
      if (adjacent) {
        for (int j = 0; j < count; ++j) out[j] = value(static_cast<double>(gains[first + j]));
      } else {
        for (int j = 0; j < count; ++j) out[j] = value(static_cast<double>(gains[columns[j]]));
      }
      for (int j = count; j < lanes; ++j) out[j] = T{0};
    }
    return;
  }
  for (std::int64_t row = 0; row < rows(); ++row) {
    for (int j = 0; j < count; ++j) out[row * lanes + j] = value(gain(mask_, columns[j], row));
    for (int j = count; j < lanes; ++j) out[row * lanes + j] = T{0};
  }
}

template <typename T>
std::int64_t MaskColumns<T>::nbytes() const {
  std::int64_t bytes = vector_bytes(table_, inner_, outer_, row_squared_, column_squared_);
  for (const OfficialSteps* steps : {&own_, &mirror_})
    bytes += vector_bytes(steps->disc, steps->ring_begin, steps->ring_end);
  return bytes + (radial_ ? radial_->nbytes() : 0);
}

template class MaskColumns<float>;
template class MaskColumns<double>;

}  // namespace freemerge
