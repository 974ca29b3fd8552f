#include "cuda/coarse_filter.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "common/error.h"
#include "common/window.h"
#include "cuda/coarse_bins.h"
#include "cuda/launch_math.h"

namespace freemerge::cuda {
namespace {

// M at a bin that may lie beyond the stored half of the spectrum, and its row beyond the period.
double gain_around(const Mask& mask, std::int64_t bin_y, std::int64_t bin_x) {
  const Bin bin = stored_bin(mask, wrap(bin_y, mask.height), bin_x);
  return mask_gain(mask, bin.y, bin.x);
}

}  // namespace

SpectrumFilter coarse_filter(const Plan& plan, const Upload& upload) {
  const Mask& mask = plan.mask;
  require(mask.kind != MaskKind::kTable, "a table has no coarse grid: it is on the device");
  const std::vector<double> rows = make_window(mask.height, plan.rows).transform;
  const std::vector<double> columns = make_window(mask.width, plan.columns).transform;
  const std::int64_t bins = plan.columns.cells / 2 + 1;
  const std::int64_t height = grid_rows(plan.rows, mask.height);
  const std::int64_t center_x = plan.columns.nyquist ? mask.width / 2 : 0;
  const double size = static_cast<double>(mask.height) * static_cast<double>(mask.width);
  const double smaller = static_cast<double>(height) * static_cast<double>(plan.columns.cells) / size;
  std::vector<float> gains(static_cast<std::size_t>(height * bins), 0.0f);
  std::vector<float> energies(gains.size(), 0.0f);
  double center_share = 0.0;
  std::vector<float> column_gains(static_cast<std::size_t>(bins), 0.0f);
  for (std::int64_t row = 0; row < height; ++row) {
    const CoarseBin bin = coarse_bin(row, plan.rows, mask.height);
    if (!bin.inside) continue;
    for (std::int64_t dx = 0; dx < std::min(plan.columns.band, bins); ++dx) {
      const double gain = gain_around(mask, bin.y, center_x + dx);
      const double window =
          rows[static_cast<std::size_t>(bin.distance)] * columns[static_cast<std::size_t>(dx)];
      const double share = (gain - plan.background) / (window * window);
      const bool alone = dx == 0 || 2 * dx == plan.columns.cells;  // else its mirror has as much
      const auto i = static_cast<std::size_t>(row * bins + dx);
      gains[i] = static_cast<float>(share * smaller);
      // Row passes double spectra.
      energies[i] = static_cast<float>(share * (gain + plan.background) * (alone ? 0.25 : 0.5) / size);
      if (bin.y == 0 && center_x + dx == 0) center_share = 2.0 * size * window;
      column_gains[static_cast<std::size_t>(dx)] = std::nanf("");
    }
  }
  Mask coarse;
  coarse.kind = MaskKind::kTable;
  coarse.height = height;
  coarse.width = plan.columns.cells;
  coarse.table = to_device(gains, upload);
  SpectrumFilter filter = spectrum_filter(coarse, plan.tiles, column_gains, upload);
  filter.columns.energies = to_device(energies, upload);
  filter.columns.center_share = center_share;
  return filter;
}

}  // namespace freemerge::cuda
