// Gains of blocks of columns, as the full form multiplies with them, against mask.h bin by bin:
// every kind of mask on every instruction set, in float and double, along both axes, for columns that are not
// neighbours.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "cpu/mask_columns.h"

namespace freemerge {
namespace {

using test::check;

// The gain of mask.h, which takes the left half of the spectrum, at any bin.
double gain_at(const Mask& mask, std::int64_t y, std::int64_t x) {
  if (x <= mask.width / 2) return mask_gain(mask, y, x);
  return mask_gain(mask, (mask.height - y) % mask.height, mask.width - x);
}

template <typename T>
void test_fill(const Mask& mask, bool transposed, const Kernels& kernels, const std::string& name) {
  const MaskColumns<T> mask_columns(mask, transposed, kernels);
  const int lanes = transform_kernels(kernels, T{}).lanes;
  const auto exact = [&](std::int64_t column, std::int64_t row) {
    return transposed ? gain_at(mask, column, row) : gain_at(mask, row, column);
  };
  // Of a smooth mask's squared radius three roundings are allowed; where gains are small they count `order`
  // times.
  const double unit = std::is_same_v<T, float> ? 6e-8 : 1.2e-16, tolerance = unit * (2 + 0.8 * mask.order);
  const double factor = 1.0 / 64;
  std::vector<T> gains(static_cast<std::size_t>(mask_columns.rows() * lanes));
  for (const int count : {1, lanes - 1, lanes}) {
    std::vector<std::int32_t> columns;
    double largest = 0;
    for (int j = 0; j < count; ++j) {
      const std::int64_t column = j * 37 % (mask_columns.length() / 2 + 1);
      columns.push_back(static_cast<std::int32_t>(column));
      for (std::int64_t row = 0; row < mask_columns.rows(); ++row)
        largest = std::max(largest, exact(column, row));
    }
    for (const double background : {0.0, 0.25}) {
      mask_columns.fill(columns.data(), count, lanes, background, factor, gains.data());
      for (std::int64_t row = 0; row < mask_columns.rows(); ++row) {
        for (int j = 0; j < count; ++j) {
          const std::int64_t column = columns[static_cast<std::size_t>(j)];
          const double expected = factor * (exact(column, row) - background);
          const double found = static_cast<double>(gains[static_cast<std::size_t>(row * lanes + j)]);
          check(std::abs(found - expected) <= tolerance * factor * std::max(largest, background),
                [&] { return name + ": column " + std::to_string(column) + ", row " + std::to_string(row); });
        }
      }
    }
  }
}

std::vector<Mask> masks(std::int64_t height, std::int64_t width) {
  const double side = static_cast<double>(std::min(height, width));
  std::vector<Mask> all;
  for (const bool normalized : {false, true}) {
    Mask mask;
    mask.height = height;
    mask.width = width;
    if (normalized) {
      mask.unit_y = 1.0 / static_cast<double>(height);
      mask.unit_x = 1.0 / static_cast<double>(width);
    }
    const double unit = normalized ? 1.0 / side : 1.0;
    mask.gain1 = 0.5;
    mask.gain2 = 1;
    for (const double cutoff : {1e-6, 0.5, 0.2 * side, 0.7 * side, 2 * side, 1e3 * side}) {
      mask.edge0 = cutoff * unit;
      mask.edge1 = 1.5 * cutoff * unit;
      mask.kind = MaskKind::kSteps;
      all.push_back(mask);
      for (const auto& [kind, name] : kMaskNames) {
        if (!is_smooth(kind)) continue;
        mask.kind = kind;
        for (const double order : {1.0, 2.0, 3.0, 4.0, 5.0, 2.5}) {
          mask.order = order;
          all.push_back(mask);
        }
      }
    }
    mask.kind = MaskKind::kOfficial;
    mask.edge0 = 0.7 * side;
    mask.edge1 = std::floor(side / 10);
    all.push_back(mask);
  }
  return all;
}

}  // namespace
}  // namespace freemerge

int main() {
  using namespace freemerge;
  for (const Isa isa : test::available_isas()) {
    for (const auto& [height, width] : {std::pair{24, 30}, std::pair{130, 131}, std::pair{127, 260}}) {
      for (const Mask& mask : masks(height, width)) {
        const std::string name = isa_name(isa) + ", kind " + std::to_string(static_cast<int>(mask.kind)) +
                                 ", order " + std::to_string(mask.order) + ", edge " +
                                 std::to_string(mask.edge0) + ", " + std::to_string(height) + " x " +
                                 std::to_string(width);
        for (const bool transposed : {false, true}) {
          test_fill<float>(mask, transposed, kernels(isa), name);
          test_fill<double>(mask, transposed, kernels(isa), name);
        }
      }
    }
  }
}
