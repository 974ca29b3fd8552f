// What the decimated filter multiplies its coarse spectrum with: the mask's departure from the background
// over the box of frequencies it keeps, with the windows' transforms divided out.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "common/plan.h"
#include "common/window.h"

namespace freemerge {

// Frequencies are offsets (a, k) from the centre of the box: |a| < rows.band down, 0 <= k < columns.band
// along. gain(a, k) = departure(a, k) * row_factor[|a|] * column_factor[k].
struct BoxGain {
  std::int64_t band;   // of the rows
  std::int64_t pitch;  // columns.band rounded up to whole vectors; factors beyond the band are zero
  std::vector<float> row_factor;
  std::vector<float> column_factor;

  // Most masks are symmetric in a and change at most twice along it: departure = value[i] where
  // bound[i - 1] <= |a| < bound[i], one entry per column each.
  std::vector<float> value[3];
  std::vector<std::int32_t> bound[2];
  // Any other mask: rows a = 1 - band .. band - 1 of `pitch` columns; empty if the mask has steps.
  std::vector<float> table;
};

// A BoxGain as the kernels see it.
struct BoxGainView {
  explicit BoxGainView(const BoxGain& gain)
      : band(gain.band),
        pitch(gain.pitch),
        row_factor(gain.row_factor.data()),
        column_factor(gain.column_factor.data()),
        value{gain.value[0].data(), gain.value[1].data(), gain.value[2].data()},
        bound{gain.bound[0].data(), gain.bound[1].data()},
        table(gain.table.empty() ? nullptr : gain.table.data()) {}

  std::int64_t band, pitch;
  const float *row_factor, *column_factor;
  const float* value[3];
  const std::int32_t* bound[2];
  const float* table;  // null if the mask has steps
};

// Cached unless the mask is a table, whose contents a key cannot tell.
std::shared_ptr<const BoxGain> box_gain_for(const Plan& plan, const Window& rows, const Window& columns);

}  // namespace freemerge
