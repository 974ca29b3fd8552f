#include "cuda/column_tables.h"

#include <cstdint>

#include "common/error.h"
#include "cuda/passes.h"

namespace freemerge::cuda {
namespace {

// Rows with gain0, and rows with gain0 or gain1: their boundaries fall from column to column.
std::vector<int2> step_rows(const Mask& mask) {
  std::vector<int2> steps;
  int2 rows{static_cast<int>(mask.height / 2 + 1), static_cast<int>(mask.height / 2 + 1)};
  for (std::int64_t bin = 0; bin <= mask.width / 2; ++bin) {
    const double fx = mask.unit_x * static_cast<double>(bin);
    const auto is_inside = [&](int row, double edge) {
      const double fy = mask.unit_y * row;
      return is_below(fy * fy + fx * fx, edge);
    };
    while (rows.x > 0 && !is_inside(rows.x - 1, mask.edge0)) --rows.x;
    while (rows.y > 0 && !is_inside(rows.y - 1, mask.edge1)) --rows.y;
    steps.push_back(rows);
  }
  return steps;
}

}  // namespace

ColumnTables column_tables(const Mask& mask, const std::vector<float>& gains, int parts, int chirp,
                           const Upload& upload) {
  require(static_cast<std::int64_t>(gains.size()) == mask.width / 2 + 1,
          "one gain is needed for each column");
  const std::int64_t length = mask.height / parts;
  return {to_device(gains, upload),
          mask.kind == MaskKind::kSteps ? to_device(step_rows(mask), upload) : nullptr,
          to_device(unit_roots(chirp > 0 ? chirp : length), upload),
          chirp > 0 ? chirp_tables(length, line_passes(length, chirp).passes, upload) : Chirp{},
          nullptr,
          0.0};
}

}  // namespace freemerge::cuda
